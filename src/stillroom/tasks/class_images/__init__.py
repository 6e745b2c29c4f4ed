"""Images by class."""
