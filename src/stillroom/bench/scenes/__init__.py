"""Captions and scenes of handwritten digits."""
