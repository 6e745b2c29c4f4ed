"""Metrics, costs and the feature extractor: each a function with its definition in the docstring."""
