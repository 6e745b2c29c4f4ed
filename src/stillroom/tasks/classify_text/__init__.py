"""Recognition of texts."""
