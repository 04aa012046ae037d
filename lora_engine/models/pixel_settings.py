"""The pixel settings of a checkpoint: its preprocessor, as transformers would apply it."""

from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch

from lora_engine.data.pixels import PixelSettings
from lora_engine.models.config_values import valid_image_size
from lora_engine.models.model_folder import PretrainedError, read_json
from lora_engine.terminal import one_line

# The defaults of transformers' preprocessors.
_HALF = [0.5, 0.5, 0.5]
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_ALL_PREPROCESSORS = {
    "do_resize": True, "do_center_crop": False, "do_rescale": True, "do_normalize": True,
    "default_to_square": True, "rescale_factor": 1 / 255,
}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "BlipImageProcessor": {"size": [384, 384], "resample": 3, **_CLIP},
    "ViTImageProcessor": {
        "size": [224, 224], "resample": 2, "image_mean": _HALF, "image_std": _HALF,
    },
    "DeiTImageProcessor": {
        "size": [256, 256], "resample": 3, "do_center_crop": True, "crop_size": 224,
        "image_mean": _HALF, "image_std": _HALF,
    },
    "BeitImageProcessor": {
        "size": [224, 224], "resample": 3, "crop_size": 224, "image_mean": _HALF,
        "image_std": _HALF,
    },
    "CLIPImageProcessor": {
        "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": 224,
        "default_to_square": False, **_CLIP,
    },
}
PREPROCESSORS["BitImageProcessor"] = PREPROCESSORS["CLIPImageProcessor"]  # DINOv2's


def read_pixel_settings(folder: Path, *, default_kind: str | None) -> PixelSettings:
    """The settings of a folder's preprocessor, of `default_kind` if it names none.

    Raises PretrainedError if they are unusable.
    """
    try:
        given = _preprocessor_of(folder)
        return _pixel_settings(given, default_kind)
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"{folder} has no usable preprocessor_config.json: {one_line(error)}"
        ) from None


def _preprocessor_of(folder: Path) -> dict[str, Any]:
    """The settings in preprocessor_config.json, or in processor_config.json."""
    path = folder / "processor_config.json"
    given = read_json(path).get("image_processor") if path.exists() else None
    given = read_json(folder / "preprocessor_config.json") if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"image_processor is {shortened(given)}; expected a JSON object")
    return given


def _pixel_settings(given: Mapping[str, Any], default_kind: str | None) -> PixelSettings:
    """What the transformers class would do with these settings; raises ValueError."""
    kind = given.get("image_processor_type")
    if kind is None:  # older versions use another key
        kind = given.get("feature_extractor_type") or default_kind
        kind = str(kind).replace("FeatureExtractor", "ImageProcessor")
    name = str(kind).removesuffix("Fast").removesuffix("Pil")
    if name not in PREPROCESSORS:
        raise ValueError(
            f"image_processor_type is {shortened(kind)}; expected one of {', '.join(PREPROCESSORS)}"
        )
    settings = {**_ALL_PREPROCESSORS, **PREPROCESSORS[name], **given}
    if not settings["do_resize"]:
        raise ValueError("do_resize is not true: images would differ in size")
    rescale_factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    resample = settings["resample"]
    if type(resample) is not int or not _is_finite(rescale_factor):
        raise ValueError(
            f"resample is {shortened(resample)}, rescale_factor {shortened(rescale_factor)}; "
            f"expected numbers"
        )
    return PixelSettings(
        resize=_edges(settings["size"], is_square=settings["default_to_square"]),
        resample=resample,
        crop=_crop(settings.get("crop_size")) if settings["do_center_crop"] else None,
        rescale_factor=rescale_factor,
        mean=_channels(settings["image_mean"]) if settings["do_normalize"] else (0.0, 0.0, 0.0),
        std=_channels(settings["image_std"]) if settings["do_normalize"] else (1.0, 1.0, 1.0),
    )


def _edges(size: Any, *, is_square: bool) -> tuple[int, int] | int:
    """(height, width) or the length of the shortest edge, from any form transformers accepts."""
    if isinstance(size, dict) and size.keys() == {"height", "width"}:
        size = [size["height"], size["width"]]
    elif isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        size, is_square = size["shortest_edge"], False
    if isinstance(size, list):
        return valid_image_size(size)
    height, width = valid_image_size((size, size))
    return (height, width) if is_square else height


def _crop(size: Any) -> tuple[int, int]:
    edges = _edges(size, is_square=True)
    if isinstance(edges, int):
        raise ValueError(f"crop_size is {shortened(size)}; expected height and width")
    return edges


def _channels(values: Any) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3 or not all(map(_is_finite, values)):
        raise ValueError(f"mean or std is {shortened(values)}; expected three numbers")
    return values[0], values[1], values[2]


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < torch.finfo(torch.float32).max
