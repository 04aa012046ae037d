"""LoRA: the layer and its formula, injection into a model, and adapters in PEFT's format."""
