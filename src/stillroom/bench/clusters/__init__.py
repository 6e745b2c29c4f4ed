"""Eight classes of four places each."""
