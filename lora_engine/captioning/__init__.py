"""How captions come out, and how good they are: generation, metrics, merged weights."""
