"""One file per published system, in wings."""
