"""What is done to a network from outside: taps, adapters, freezing, new weights, no weights."""
