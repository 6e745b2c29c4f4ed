"""Recognition of images."""
