"""Masked and autoregressive token models."""
