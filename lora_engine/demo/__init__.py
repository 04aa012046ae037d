"""The embedded demo: scenes that the package draws, and a tiny captioner of each family."""

from pathlib import Path


def captioner_folder(family: str) -> str:
    """The Hugging Face folder of the tiny captioner "blip" or "vit_gpt2" that ships here."""
    return str(Path(__file__).parent / family)
