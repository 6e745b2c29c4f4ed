"""Definitions of words, to be sorted into classes."""
