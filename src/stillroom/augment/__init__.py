"""Random changes of inputs that leave their meaning as it is."""
