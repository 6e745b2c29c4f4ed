"""Eight classes on a ring."""
