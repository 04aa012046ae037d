"""What LoRA is here: the layer with its formula, injection, and adapters in PEFT's format."""
