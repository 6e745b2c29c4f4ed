"""Small pictures in classes: Fashion-MNIST, MNIST, or a folder of them."""
