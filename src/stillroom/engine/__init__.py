"""The training loop and all that keeps it safe. It knows nothing of any method; import from its modules."""
