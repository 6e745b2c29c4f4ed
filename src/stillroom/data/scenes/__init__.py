"""The scenes world: what captions can say, and pictures of it."""
