"""What is computed once: the frozen encoder's features of images, in memory and on disk."""
