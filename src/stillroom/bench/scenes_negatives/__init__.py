"""The bench of captions that leave a colour open, and of negative texts."""
