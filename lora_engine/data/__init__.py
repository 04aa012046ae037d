"""How image-caption pairs come in: annotations, images, tokenized captions, and batches."""
