"""Two overlapping classes."""
