"""The glosses under all-MiniLM-L6-v2."""
