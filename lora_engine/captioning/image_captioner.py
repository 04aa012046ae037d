"""A captioner for Python: load one, with an adapter if there is one, and caption any image.

    captioner = load_captioner("Salesforce/blip-image-captioning-base", adapter="runs/mine")
    captioner.caption("dog.jpg")
"""

import dataclasses
import io
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, NoReturn, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_engine.captioning.adapted_captioner import (
    load_captioners,
    sharing_weights,
    with_adapter,
)
from lora_engine.captioning.attention_map import WordAttention, word_attention
from lora_engine.captioning.captioner import caption_ids, mean_log_probabilities
from lora_engine.captioning.generation_settings import GenerationSettings
from lora_engine.data.image_files import ABOUT_LINKS, is_link
from lora_engine.data.pixels import load_pixels
from lora_engine.data.python_rows import image_bytes, shown_type
from lora_engine.devices import (
    PRECISIONS,
    disable_tf32,
    resolve_device,
    resolve_dtype,
    use_device,
)
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.features.precision import EncoderPrecision
from lora_engine.keywords import known_keywords
from lora_engine.lora.adapter import read_adapter
from lora_engine.lora.adapter_folder import find_adapter
from lora_engine.models import CaptioningModel
from lora_engine.models.families import FAMILIES
from lora_engine.models.pretrained import Captioner

# A path, the bytes of an image file, a PIL image, or an array of uint8, (H, W, 3) or (H, W).
ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

# What people of other libraries call, and what there is instead.
_INSTEAD = {
    "generate": "captioner.caption(image), or lora_engine.generate(captioner.model, features, ...)",
    "predict": "captioner.caption(image)",
    "processor": "captioner.caption(image)",
    "to": 'load_captioner(..., device="cuda")',
    "cuda": 'load_captioner(..., device="cuda")',
    "half": 'load_captioner(..., precision="fp16")',
    "fit": "lora_engine.train(model=..., data=...)",
    "train": "lora_engine.train(model=..., data=...)",
    "save_pretrained": "lora_engine.save_adapter(captioner.model, folder)",
    "save_adapter": "lora_engine.save_adapter(captioner.model, folder)",
    "set_adapter": "captioner.load_adapter(folder)",
    "load_lora_weights": "captioner.load_adapter(folder)",
    "unload": "captioner.unload_adapter()",
    "unload_lora_weights": "captioner.unload_adapter()",
    "delete_adapter": "captioner.unload_adapter()",
    "merge_and_unload": "python -m lora_engine merge",
    "print_trainable_parameters": "print(lora_engine.inject(captioner.model, targets))",
    "push_to_hub": "lora_engine.save_adapter(captioner.model, folder) and `hf upload`",
    "disable_adapter": "captioner.base, or captioner.unload_adapter()",
    "unmerged": "captioner.base",
}


class ScoredCaption(NamedTuple):
    """A caption, and the mean log-probability of its tokens (nats; its end token included).

    `exp(score)` is the geometric mean of the tokens' probabilities. They are those of the model
    itself, whatever the search, the penalties or the temperature that chose the tokens. Scores
    compare captions of one captioner; a long caption is not penalized for its length.
    """

    text: str
    score: float


@known_keywords(model="name_or_path")
def load_captioner(
    name_or_path: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    family: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    encoder_precision: EncoderPrecision = "auto",
    prompt: str | None = None,
    force: bool = False,
) -> "ImageCaptioner":
    """Load a captioner from a Hugging Face folder or a Hub name, to caption images with it.

    `adapter` is an adapter folder, a run folder (its adapter/) or a Hub name; without
    `name_or_path` the base model that it was trained on is loaded. `device` is by default a GPU if
    there is one, else the CPU. `precision` and `encoder_precision` are the number formats of
    matmuls, as the flags of these names describe them (`python -m lora_engine caption --help`);
    the weights stay fp32. Captions continue the `prompt`, by default the one that the adapter was
    trained with. On a GPU, TF32 is turned off in this process, as in training.

    Raises ValueError for a model or an adapter that cannot be used; with `family`, a key of
    `FAMILIES`, for a model of another one; and for an adapter that was trained on another base
    model, unless `force` is true.
    """
    if not isinstance(name_or_path, (str, os.PathLike, NoneType)):
        raise ValueError(
            f"load_captioner() got {shown_type(name_or_path)}, expected the folder or the name of "
            f"a captioner"
        )
    for name, value, known in (
        ("family", family, [None, *FAMILIES]),
        ("precision", precision, ["auto", *PRECISIONS]),
        ("encoder_precision", encoder_precision, get_args(EncoderPrecision)),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected {', '.join(filter(None, known))}")
    on_device = resolve_device(device)
    base, adapted = load_captioners(
        name_or_path, [] if adapter is None else [adapter],
        family=family, revision=revision, prompt=prompt, force=force,
    )
    use_device(on_device)
    disable_tf32()
    return ImageCaptioner(
        adapted[0] if adapted else base,
        base,
        device=on_device,
        dtype=resolve_dtype(precision, on_device),
        encoder_precision=encoder_precision,
    )


class ImageCaptioner:
    """A captioner that `load_captioner` has loaded; call it, or its `caption`, with images.

    `model` is the captioning model, which `inject`, `load_adapter`, `merge` and `generate` take; a
    LoRA adapter that was loaded is merged into it (`unmerge` takes it out of the weights).
    `tokenizer` and `pixels` turn text and images into the model's inputs. `base` is the captioner
    without adapters.
    """

    def __init__(
        self,
        captioner: Captioner,
        base: Captioner,
        *,
        device: torch.device,
        dtype: torch.dtype,
        encoder_precision: EncoderPrecision = "auto",
    ) -> None:
        self.name = captioner.name
        self.family = captioner.family
        self.folder = captioner.folder
        self.revision = captioner.revision
        self.fingerprints = captioner.fingerprints
        self.hugging_face_class = captioner.hugging_face_class
        self.tokenizer = captioner.tokenizer
        self.pixels = captioner.pixels
        self.device = device
        self._base = base
        self._settings: dict[str, Any] = {
            "device": device, "dtype": dtype, "encoder_precision": encoder_precision
        }
        # That of the base, if it is shared: an adapter's weights are released with the adapter.
        is_shared = captioner.model.encoder is base.model.encoder
        self._encoder = self._encoder_of((base if is_shared else captioner).model.to(device))
        self._use(captioner)

    def _encoder_of(self, model: CaptioningModel) -> FeatureEncoder:
        return FeatureEncoder(
            dataclasses.replace(self._base, model=model),
            device=self.device,
            dtype=self._settings["dtype"],
            precision=self._settings["encoder_precision"],
        )

    def _use(self, captioner: Captioner) -> None:
        """Caption with this captioner, the base or one that shares its frozen weights."""
        # A copy that shares all weights: what is injected into it leaves the base as it is.
        model = sharing_weights(captioner.model).to(self.device)
        # `save_adapter` records it as the adapter's base model.
        is_folder = Path(self.name).is_dir()
        name = str(Path(self.name).resolve()) if is_folder else self.name
        setattr(model, "name_or_path", name)
        if model.encoder is not self._encoder.model.encoder:
            self._encoder = self._encoder_of(model)
        self.model = model
        self.prompt = captioner.prompt
        self._captioner = dataclasses.replace(captioner, model=model)
        if self._base.prompt != self.prompt:
            self._base = dataclasses.replace(self._base, prompt=self.prompt)
            vars(self).pop("base", None)

    @cached_property
    def base(self) -> "ImageCaptioner":
        """The captioner without adapters, with the same prompt; it shares all other weights."""
        return ImageCaptioner(self._base, self._base, **self._settings)

    @known_keywords(model="load_captioner")
    def load_adapter(
        self, adapter: str | Path, *, prompt: str | None = None, force: bool = False
    ) -> None:
        """Caption with another adapter, in place of the present one if there is one.

        The base is not loaded again; `adapter`, `prompt`, `force` and what is raised are those of
        `load_captioner`. After an error the captioner is as it was. `model` is a new object
        afterwards; what was injected into the previous one is not in it.
        """
        read = read_adapter(find_adapter(adapter))
        self._use(with_adapter(self._base, read, prompt=prompt, force=force))

    def unload_adapter(self) -> None:
        """Caption with the base alone, whose weights no adapter has changed; the prompt stays."""
        self._use(self._base)

    @known_keywords()
    def caption(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        prompt: str | None = None,
        num_beams: int = 1,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        num_return_sequences: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 16,
        return_scores: bool = False,
    ) -> Any:
        """Caption an image -> text, or several images -> a list of texts, in their order.

        An image is a path, the bytes of an image file, a PIL image, or an array of uint8, (height,
        width, 3) or (height, width); it is decoded within the limits of data/images.py, into the
        pixels that training uses. Captions do not include the prompt. With `return_scores`, each
        result is a `ScoredCaption`, (text, score).

        `GenerationSettings` describes the settings from `num_beams` to `seed`; they are those of
        the command `caption`. With more than one of `num_return_sequences`, each image has a list.
        Samples depend only on `seed` and on the image's position.

        Raises ValueError for settings out of range, and for an image that cannot be used; it names
        the image's position.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        if not isinstance(prompt, (str, NoneType)):
            raise ValueError(f"prompt is {shown_type(prompt)}, expected text, one for all images")
        settings = GenerationSettings(
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            num_return_sequences=num_return_sequences,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        settings.check_generation()
        captioner = self._with_prompt(prompt)
        is_one = _is_one(images)
        items: list[Any] = [images] if is_one else list(images)  # type: ignore[arg-type]
        results: list[Any] = []
        for begin in range(0, len(items), batch_size):
            numbers = range(len(items))[begin : begin + batch_size]
            pixels = [
                self._pixels(items[number], "" if is_one else f"images[{number}]: ")
                for number in numbers
            ]
            features = self._features(np.stack(pixels))
            ids = caption_ids(captioner, features, settings, numbers=numbers)
            captions: list[Any] = list(map(self.tokenizer.decode, ids))
            if return_scores:
                scores = mean_log_probabilities(captioner, features, ids)
                captions = list(map(ScoredCaption, captions, scores))
            if num_return_sequences > 1:
                captions = [
                    captions[first : first + num_return_sequences]
                    for first in range(0, len(captions), num_return_sequences)
                ]
            results += captions
        return results[0] if is_one else results

    __call__ = caption

    def word_attention(self, image: ImageLike, caption: str) -> WordAttention:
        """What the decoder looks at for each word of a caption of an image, for `heat_map`.

        The caption need not be the captioner's own. Raises ValueError for an image that cannot be
        used.
        """
        features = self._features(self._pixels(image, "")[None])
        return word_attention(self._with_prompt(None), features, caption)

    def _with_prompt(self, prompt: str | None) -> Captioner:
        """The captioner as it is now; None is its own prompt."""
        prompt = self.prompt if prompt is None else prompt
        return dataclasses.replace(self._captioner, model=self.model, prompt=prompt)

    def _pixels(self, image: Any, where: str) -> np.ndarray:
        """The pixels (3, H, W) of one image; raises ValueError, which begins with `where`."""
        try:
            if isinstance(image, str) and is_link(image):
                raise ValueError(f"{image} is a web address: {ABOUT_LINKS}")
            if isinstance(image, (str, os.PathLike)):
                return load_pixels(os.fspath(image), self.pixels)
            return load_pixels(image_bytes(image), self.pixels)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}{error}") from None

    def _features(self, pixels: np.ndarray) -> Tensor:
        """uint8 pixels (B, 3, H, W) -> features (B, P, D), as every command computes them."""
        device = next(self.model.parameters()).device
        if device != self.device:
            raise ValueError(
                f"the model has been moved to {device}, but this captioner is on {self.device}: "
                f'load it with device="{device}"'
            )
        return self._encoder.unpack(self._encoder.encode(torch.from_numpy(pixels)))

    def __repr__(self) -> str:
        return f"ImageCaptioner({self.name!r}, device={str(self.device)!r})"

    def __getattr__(self, name: str) -> NoReturn:
        advice = ""
        if name in _INSTEAD:
            advice = f": use {_INSTEAD[name]}"
        elif hasattr(self.__dict__.get("model"), name):
            advice = ": use captioner.model, which has it"
        raise AttributeError(
            f"an ImageCaptioner has no attribute {name!r}{advice}", name=name, obj=self
        )


def _is_one(images: Any) -> bool:
    """Whether this is one image, or something that is taken for one and refused as such."""
    kinds = (
        str, os.PathLike, bytes, bytearray, io.IOBase, Image.Image, np.ndarray, Tensor, Mapping
    )
    return isinstance(images, kinds) or not isinstance(images, Iterable)
