"""8x8 digits, to be recognised."""
