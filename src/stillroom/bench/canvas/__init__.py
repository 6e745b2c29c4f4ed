"""Digits on a larger canvas, for image encoders."""
