"""Image-caption pairs: annotations, images, tokenized captions, and batches."""
