"""The table of captioner families: the only place that lists them.

To add a family, write its model file in `models/` and add a row here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_engine.models import blip, vit_gpt2
from lora_engine.models.protocol import CaptioningModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a kind of Hugging Face checkpoint becomes one of our models."""

    name: str
    """Short name, such as in the names of run folders."""
    from_config: Callable[[Any], CaptioningModel]
    """Builds the model that a configuration describes; raises ValueError if it is impossible."""
    convert_state: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Renames and reshapes a checkpoint's tensors for the model."""
    special_ids: Callable[[Any], tuple[int, int, int]]
    """(start, end, pad) token ids of a configuration; raises ValueError if one is missing."""
    other_names: Sequence[Sequence[tuple[str, str]]] = ()
    """Other names of a checkpoint's tensors, which adapters may use: in each version of them,
    regular expressions over the beginning of a name and their replacements, in order."""
    head_biases: tuple[str, ...] = ()
    """The names under which a checkpoint may store the bias of the vocabulary head."""
    unused: str = ""
    """A regular expression over the checkpoint's tensors that captioning does not use."""
    hugging_face_class: str | None = None
    """The transformers class that loads the checkpoint, if transformers has one."""
    part_types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The model types that parts of the configuration may have, by the part's name."""
    fit_images: Callable[[CaptioningModel, tuple[int, int]], None] | None = None
    """Lets a loaded encoder take images of the preprocessor's size (height, width), if it can."""
    image_processor: str | None = None
    """The preprocessor of checkpoints that do not name theirs."""
    recipe: str = "finetune"
    """The module in `recipes/` that trains the family."""
    generate_with_prompt: str | None = None
    """transformers code for the model card that continues `{prompt!r}`: it sets `tokens` and
    `start`, the position at which the caption begins."""


# By the model_type of config.json.
FAMILIES: dict[str, Family] = {
    "blip": Family(
        name="blip",
        from_config=blip.from_config,
        convert_state=blip.convert_state,
        special_ids=blip.special_ids,
        head_biases=blip.HEAD_BIASES,
        unused=blip.UNUSED,
        hugging_face_class="BlipForConditionalGeneration",
        image_processor="BlipImageProcessor",
        recipe="blip_cc3m",
        # BLIP's generate replaces [CLS] by [DEC] and drops the [SEP].
        generate_with_prompt="""\
prompt_ids = tokenizer({prompt!r}, return_tensors="pt").input_ids  # [CLS] prompt [SEP]
tokens = model.generate(pixel_values=pixel_values, input_ids=prompt_ids, max_new_tokens=30)
start = prompt_ids.shape[1] - 1  # behind [DEC] prompt""",
    ),
    "vision-encoder-decoder": Family(
        name="vit_gpt2",
        from_config=vit_gpt2.from_config,
        convert_state=vit_gpt2.convert_state,
        special_ids=vit_gpt2.special_ids,
        other_names=vit_gpt2.OTHER_NAMES,
        unused=vit_gpt2.UNUSED,
        hugging_face_class="VisionEncoderDecoderModel",
        part_types={"encoder": vit_gpt2.ENCODERS, "decoder": ("gpt2",)},
        fit_images=vit_gpt2.fit_images,
        recipe="vit_gpt2_cc3m",
        generate_with_prompt="""\
prompt_ids = tokenizer(tokenizer.bos_token + {prompt!r}, return_tensors="pt").input_ids
tokens = model.generate(
    pixel_values=pixel_values, decoder_input_ids=prompt_ids, max_new_tokens=30
)
start = prompt_ids.shape[1]  # behind the start token and the prompt""",
    ),
}


def family_of_class(hugging_face_class: str | None) -> Family | None:
    """The family that a transformers class loads, as adapters name it; None if there is none."""
    families = [f for f in FAMILIES.values() if f.hugging_face_class == hugging_face_class]
    return families[0] if families and hugging_face_class is not None else None
