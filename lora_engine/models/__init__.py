"""Our own bodies of the captioners: one encoder, two decoders.

A captioner is an `nn.Module` with these methods, which is all that the rest of the package knows:

    encode(pixel_values (B, 3, height, width)) -> features (B, P, D)      frozen
    decode(input_ids (N, T), features, cache=None) -> hidden (N, T, D)    trained by LoRA
    head(hidden (..., D)) -> logits (..., V)                              frozen

where the head is the linear layer `vocabulary` of `head_input(hidden)` (..., D), so that the loss
need not hold all logits.

N is B, or a multiple of it: each image's features then serve N / B consecutive rows (beams).

It also has `encoder` (with `image_size`), `decoder` (with `layers`, `max_positions` and
`gradient_checkpointing`), what `lora.inject` reads, `tied_head` (the names of the head and of the
embedding that a checkpoint may tie it to) and, where transformers has Conv1D, `fan_in_fan_out`.

Axes: B batch, T caption tokens, P image tokens, D width, H heads, K head width, V vocabulary.
"""

from lora_engine.models.blip import BlipCaptioner
from lora_engine.models.vit_gpt2 import ViTGPT2Captioner

CaptioningModel = BlipCaptioner | ViTGPT2Captioner
