"""The commands of `python -m lora_engine VERB` and what a recipe runs, one file per command."""
