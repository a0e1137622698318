"""A small convolutional classifier of image pairs."""
