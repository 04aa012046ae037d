"""Load a captioner from a Hugging Face checkpoint: configuration, weights, tokenizer, pixels.

The only file that imports transformers, which supplies configurations and tokenizers; the models
are our own, with the checkpoint's weights. transformers gets the configuration as a dictionary that
was checked, and the folder only for the tokenizer.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch

from lora_engine.data.captions import CaptionTokenizer
from lora_engine.data.pixels import PixelSettings
from lora_engine.models.families import FAMILIES, Family
from lora_engine.models.model_folder import (
    PretrainedError,
    check_files,
    find_folder,
    read_json,
)
from lora_engine.models.pixel_settings import read_pixel_settings
from lora_engine.models.protocol import CaptioningModel
from lora_engine.models.weights import fingerprint, load_state, read_checkpoint, tie_head
from lora_engine.terminal import one_line


@dataclass
class Captioner:
    """A loaded captioner: the model, and what turns text and images into its inputs.

    `family` is a key of `FAMILIES`. `name` is the Hub name or folder that was asked for, `folder`
    holds its files. `fingerprints` identify what was loaded, whatever files it came from: SHA-256
    of the weights ("base") and of the "tokenizer", "configuration" and "preprocessor" as JSON.
    """

    model: CaptioningModel
    tokenizer: CaptionTokenizer
    pixels: PixelSettings
    family: str
    name: str
    folder: Path
    revision: str | None
    fingerprints: dict[str, str]
    prompt: str = ""  # the words that its captions continue

    @property
    def hugging_face_class(self) -> str | None:
        """The transformers class that loads the checkpoint, if transformers has one."""
        return FAMILIES[self.family].hugging_face_class


def load_captioner(
    name_or_path: str | Path, *, family: str | None = None, revision: str | None = None
) -> Captioner:
    """Load a captioner from a Hugging Face folder or a Hub name, on the CPU, in fp32.

    With `family`, a key of `FAMILIES`, other families are refused. The model is in evaluation mode.

    Raises PretrainedError if the folder or name cannot be found (with advice for machines without a
    network), if it is not a captioner of a known family, if it names code to run, and if a tensor
    is missing, unknown, of another shape than the configuration says, or not finite.
    """
    folder = find_folder(str(name_or_path), revision)
    config = _read_config(folder, family)
    values: dict[str, Any] = {}
    model = _load_model(folder, _RecordingConfig(config, values))
    base = fingerprint(model)
    tokenizer = _read_tokenizer(folder, config, model)
    family = config.model_type
    pixels = _read_pixels(folder, FAMILIES[family], model)
    return Captioner(
        model=model,
        tokenizer=tokenizer,
        pixels=pixels,
        family=family,
        name=str(name_or_path),
        folder=folder,
        revision=revision,
        fingerprints={
            "base": base,
            "configuration": _canonical(values),
            "tokenizer": _tokenizer_fingerprint(folder, tokenizer),
            "preprocessor": _canonical(dataclasses.asdict(pixels)),
        },
    )


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> CaptionTokenizer:
    """A captioner's tokenizer, without its weights; raises PretrainedError as `load_captioner`."""
    folder = find_folder(str(name), revision)
    config = _read_config(folder, None)
    with torch.device("meta"):
        model = _build(folder, config)
    return _read_tokenizer(folder, config, model)


def load_model(folder: str | Path) -> CaptioningModel:
    """The model alone, from a folder that need not have tokenizer and preprocessor files."""
    return _load_model(Path(folder), _read_config(Path(folder), None))


def build_from_config(folder: str | Path) -> CaptioningModel:
    """The model that a folder's config.json describes, with tied head and initial weights.

    Under `torch.device("meta")` it takes no memory, for example to count parameters.
    """
    model = _build(Path(folder), _read_config(Path(folder), None))
    tie_head(model)
    return model


class _RecordingConfig:
    """A configuration that records which values are read, under Hugging Face's names.

    They identify a configuration across versions of this package, unlike the names of our modules.
    """

    def __init__(self, config: Any, values: dict[str, Any], prefix: str = "") -> None:
        self._config, self._values, self._prefix = config, values, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if hasattr(value, "to_dict"):  # a part of the configuration
            return _RecordingConfig(value, self._values, f"{self._prefix}{name}.")
        self._values[self._prefix + name] = value
        return value


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _load_model(folder: Path, config: Any) -> CaptioningModel:
    with torch.device("meta"):
        model = _build(folder, config)
    tensors = read_checkpoint(folder)
    try:
        state = FAMILIES[config.model_type].convert_state(tensors)
    except (RuntimeError, IndexError) as error:  # shapes that cannot be joined or transposed
        raise PretrainedError(
            f"the weights in {folder} do not fit their configuration: {one_line(error)}"
        ) from None
    load_state(model, state, source=str(folder))
    return model.eval()


def _build(folder: Path, config: Any) -> CaptioningModel:
    """The model that a configuration describes, with weights yet to be loaded."""
    try:
        return FAMILIES[config.model_type].from_config(config)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise PretrainedError(
            f"{folder / 'config.json'} does not describe a valid model: {one_line(error)}"
        ) from None


def _read_pixels(folder: Path, family: Family, model: CaptioningModel) -> PixelSettings:
    """The preprocessor's settings, for images that the encoder takes."""
    pixels = read_pixel_settings(folder, default_kind=family.image_processor)
    if family.fit_images is not None:
        family.fit_images(model, pixels.size)
    if pixels.size != model.encoder.image_size:
        raise PretrainedError(
            f"{folder}: the preprocessor makes images of {pixels.size}, but the encoder in "
            f"config.json takes {model.encoder.image_size} (height, width)"
        )
    return pixels


# --- the configuration ---------------------------------------------------------------------


def _read_config(folder: Path, family: str | None) -> Any:
    path = folder / "config.json"
    check_files(folder)
    try:
        settings = read_json(path)
    except FileNotFoundError:
        raise PretrainedError(
            f"{folder} has no config.json; --model takes a folder in Hugging Face's format "
            f"or a Hub name"
        ) from None
    model_type = settings.get("model_type")
    expected = [family] if family else list(FAMILIES)
    if model_type not in expected:
        known = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        raise PretrainedError(
            f"{path} says model_type {shortened(model_type)}"
            f"{'' if known else ', which is not a captioner supported here'}; expected "
            f"{' or '.join(repr(name) for name in expected)} ({_class_names(expected)})"
            + (f"; recipes.{known.recipe} trains that family" if known else "")
        )
    _check_kind(path, settings)
    ids = _generation_ids(folder)
    settings |= {name: ids[name] for name in ids if settings.get(name) is None}
    from transformers import CONFIG_MAPPING, PretrainedConfig

    # For a model type that transformers does not know, a configuration without defaults.
    kind = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else PretrainedConfig
    try:
        # From the dictionary: a file could name another file to read instead.
        return kind.from_dict(settings)
    except Exception as error:  # transformers raises many kinds for wrong values
        raise PretrainedError(f"{path} is not a usable configuration: {one_line(error)}") from None


def _generation_ids(folder: Path) -> dict[str, int]:
    """The token ids of generation_config.json, for a config.json that lacks them."""
    path = folder / "generation_config.json"
    names = ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    settings = read_json(path) if path.exists() else {}
    return {name: settings[name] for name in names if type(settings.get(name)) is int}


def _check_kind(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises PretrainedError for a model of the family's type that is not a captioner."""
    family = FAMILIES[settings["model_type"]]
    expected = family.hugging_face_class
    architectures = settings.get("architectures") or []
    if architectures and expected is not None and (
        not isinstance(architectures, list) or expected not in architectures
    ):
        raise PretrainedError(
            f"{path} says architectures {shortened(architectures)}; expected {expected}"
        )
    for name, types in family.part_types.items():
        part = settings.get(name)
        part_type = part.get("model_type") if isinstance(part, dict) else None
        if part_type not in types:
            raise PretrainedError(
                f"{path} describes a {expected} whose {name} is {shortened(part_type)}; expected "
                f"{' or '.join(map(repr, types))}"
            )


def _class_names(families: Sequence[str]) -> str:
    return ", ".join(FAMILIES[name].hugging_face_class or FAMILIES[name].name for name in families)


# --- the tokenizer -------------------------------------------------------------------------


_TOKENIZER_FILES = (
    "expected this model's tokenizer.json (or vocab.txt, or vocab.json and merges.txt)"
)


@contextmanager
def _tokenizer_errors(folder: Path) -> Iterator[None]:
    """Turns any error within the context into a PretrainedError about the tokenizer files."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # such as KeyboardInterrupt; the PanicException of tokenizers is no Exception
        raise PretrainedError(
            f"{folder} has no usable tokenizer: {one_line(error)}; {_TOKENIZER_FILES}"
        ) from None


def _tokenizer_fingerprint(folder: Path, tokenizer: CaptionTokenizer) -> str:
    with _tokenizer_errors(folder):  # tokenizes every word of the vocabulary
        return hashlib.sha256(json.dumps(tokenizer.behavior()).encode()).hexdigest()


def _read_tokenizer(folder: Path, config: Any, model: CaptioningModel) -> CaptionTokenizer:
    from transformers import AutoTokenizer

    _check_tokenizer_class(folder, config)
    with _tokenizer_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
        num_special = len(set(tokenizer.all_special_ids))
        # Some wrong settings fail only in use.
        tokenizer.decode(tokenizer("a photo", add_special_tokens=False)["input_ids"])
    # Without vocabulary files transformers makes an empty tokenizer.
    num_known, num_embedded = len(tokenizer), len(model.get_parameter(model.tied_head[1]))
    if not num_special < num_known <= num_embedded:
        raise PretrainedError(
            f"{folder} has no usable tokenizer: it knows {num_known} ids, the model "
            f"{num_embedded}; {_TOKENIZER_FILES}"
        )
    try:
        ids = FAMILIES[config.model_type].special_ids(config)
    except (ValueError, AttributeError) as error:
        raise PretrainedError(f"{folder / 'config.json'}: {one_line(error)}") from None
    if not all(type(token) is int and 0 <= token < num_embedded for token in ids):
        raise PretrainedError(
            f"{folder / 'config.json'} gives start, end and pad tokens as {shortened(ids)}; "
            f"expected three ids below {num_embedded}"
        )
    start_id, end_id, pad_id = ids
    return CaptionTokenizer(
        tokenizer,
        start_id=start_id,
        end_id=end_id,
        pad_id=pad_id,
        max_positions=model.decoder.max_positions,
    )


def _check_tokenizer_class(folder: Path, config: Any) -> None:
    """Raises PretrainedError unless it is a tokenizer: AutoTokenizer would call any class named."""
    import transformers

    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    for name in (settings.get("tokenizer_class"), getattr(config, "tokenizer_class", None)):
        kind = getattr(transformers, name, None) if isinstance(name, str) else name
        if kind is not None and not (
            isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)
        ):
            raise PretrainedError(
                f"{folder} has no usable tokenizer: tokenizer_class is {shortened(name)}; expected "
                f"a transformers tokenizer"
            )
