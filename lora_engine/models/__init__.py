"""Which captioners there are and how they compute.

The model code is our own: `blip.py` and `vit_gpt2.py`, on the encoders `vit.py` and `swin.py`,
`attention.py` and `cross_attention.py`. `protocol.py` defines what the rest of the package needs of
a model, `families.py` lists the families, and `pretrained.py` loads Hugging Face checkpoints.
"""

from lora_engine.models.protocol import CaptioningModel as CaptioningModel
