"""Fashion-MNIST, for image encoders."""
