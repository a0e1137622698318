"""Image pairs: an H&E image, what is only known in training (another stain, a vector), and a label."""
