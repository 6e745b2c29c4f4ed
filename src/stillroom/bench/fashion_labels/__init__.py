"""Fashion-MNIST, to be recognised."""
