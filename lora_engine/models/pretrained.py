"""Hugging Face at the door: weights, tokenizer and pixel settings of a checkpoint come in here.

The only room that imports transformers, and the only one that may read a published `.bin` file
(with weights_only). What comes out are our own bodies with the checkpoint's numbers in them. A
further family is a body in `models/` and a row in `FAMILIES`.

A model folder is a stranger's: no code of it is run, and its files are read within limits.
transformers gets the configuration as a dictionary that was checked, and the folder only for the
tokenizer.
"""

import dataclasses
import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.data.captions import CaptionTokenizer
from lora_engine.data.pixels import PixelSettings
from lora_engine.files import UnusableFileError, check_file, read_limited
from lora_engine.lora.tensor_files import read_tensors
from lora_engine.models import CaptioningModel
from lora_engine.models.activations import ACTIVATIONS
from lora_engine.models.blip import BlipCaptioner, TextDecoder
from lora_engine.models.blip import convert_state as convert_blip
from lora_engine.models.vit import VisionTransformer
from lora_engine.models.vit_gpt2 import GPT2Decoder, ViTGPT2Captioner
from lora_engine.models.vit_gpt2 import convert_state as convert_vit_gpt2
from lora_engine.terminal import one_line


class PretrainedError(ValueError):
    """A checkpoint that cannot be found, read, or understood."""


@dataclass
class Captioner:
    """A loaded captioner: the body, and what turns text and images into its inputs.

    `fingerprints` identify what was loaded, whatever files it came from: SHA-256 of the weights
    ("base") and the "tokenizer", the values of "configuration" and "preprocessor" as JSON. `name`
    is the Hub name or the folder that was asked for; `folder` holds its files.
    """

    model: CaptioningModel
    tokenizer: CaptionTokenizer
    pixels: PixelSettings
    family: str
    name: str
    folder: Path
    revision: str | None
    fingerprints: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """That of the weights."""
        return self.fingerprints["base"]


@dataclass(frozen=True)
class Family:
    """How a kind of checkpoint becomes a body.

    `name` is short, for people; `special_ids` gives (start, end, pad) of a configuration;
    `hugging_face_class` is what loads the checkpoint in transformers. `parts` are the model types
    that parts of the configuration may have; `image_processor` is the preprocessor of a checkpoint
    that does not name its own.
    """

    name: str
    build: Callable[[Any], CaptioningModel]
    convert_state: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    special_ids: Callable[[Any], tuple[int, int, int]]
    hugging_face_class: str
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    image_processor: str | None = None


def load_captioner(
    name_or_path: str | Path, *, family: str | None = None, revision: str | None = None
) -> Captioner:
    """Load a captioner from a Hugging Face folder or a Hub name, on the CPU, in fp32.

    `family`, a key of `FAMILIES`, refuses other kinds. The body comes in evaluation mode.

    Raises PretrainedError where the folder or name cannot be found (with what to do without a
    network), is no captioner of a known family, names code to run, or has a tensor too many, too
    few, of another shape than its configuration says or with a number that is not finite.
    """
    folder = _find_folder(str(name_or_path), revision)
    config = _read_config(folder, family)
    values: dict[str, Any] = {}
    model = _load_body(folder, _Reads(config, values))
    tokenizer = _read_tokenizer(folder, config, model)
    pixels = _read_pixel_settings(folder, config, model)
    return Captioner(
        model=model,
        tokenizer=tokenizer,
        pixels=pixels,
        family=config.model_type,
        name=str(name_or_path),
        folder=folder,
        revision=revision,
        fingerprints={
            "base": fingerprint(model),
            "configuration": _canonical(values),
            "tokenizer": _tokenizer_fingerprint(folder, tokenizer),
            "preprocessor": _canonical(dataclasses.asdict(pixels)),
        },
    )


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> CaptionTokenizer:
    """A captioner's tokenizer, without its weights; raises PretrainedError as `load_captioner`."""
    folder = _find_folder(str(name), revision)
    config = _read_config(folder, None)
    with torch.device("meta"):
        model = _build(folder, config)
    return _read_tokenizer(folder, config, model)


def load_body(folder: str | Path) -> CaptioningModel:
    """The body alone, from a folder that needs no tokenizer or preprocessor files."""
    return _load_body(Path(folder), _read_config(Path(folder), None))


def build_from_config(folder: str | Path) -> CaptioningModel:
    """The body that a folder's config.json describes, with its head tied and no weights filled in.

    Under `torch.device("meta")` it costs no memory: good for counting parameters.
    """
    model = _build(Path(folder), _read_config(Path(folder), None))
    _tie_head(model)
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, shape and fp32 values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


class _Reads:
    """A configuration that records the values that are read, under Hugging Face's names.

    These, not the names of our own modules, are what later versions know a configuration by.
    """

    def __init__(self, config: Any, values: dict[str, Any], prefix: str = "") -> None:
        self._config, self._values, self._prefix = config, values, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if hasattr(value, "to_dict"):  # a part of the configuration
            return _Reads(value, self._values, f"{self._prefix}{name}.")
        self._values[self._prefix + name] = value
        return value


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _load_body(folder: Path, config: Any) -> CaptioningModel:
    with torch.device("meta"):
        model = _build(folder, config)
    tensors = _read_tensors(folder)
    try:
        state = FAMILIES[config.model_type].convert_state(tensors)
    except (RuntimeError, IndexError) as error:  # matrices that should be joined or turned
        raise PretrainedError(
            f"the weights in {folder} do not fit their configuration: {one_line(error)}"
        ) from None
    _fill(model, state, source=str(folder))
    return model.eval()


def _build(folder: Path, config: Any) -> CaptioningModel:
    """The body that a configuration describes, with weights to be filled in."""
    try:
        return FAMILIES[config.model_type].build(config)
    except (ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise PretrainedError(
            f"{folder / 'config.json'} describes no possible model: {one_line(error)}"
        ) from None


# --- configurations -------------------------------------------------------------------------


# Larger than any captioner; beyond it, building the layers alone takes long.
_LIMITS = {
    "width": 2**16, "layers": 500, "vocabulary": 2**22, "positions": 2**20, "image_size": 2**13,
}


def _build_encoder(config: Any, **differences) -> VisionTransformer:
    size = config.image_size
    return VisionTransformer(
        width=_whole(config, "hidden_size", "width"),
        num_layers=_whole(config, "num_hidden_layers", "layers"),
        num_heads=_heads(config.num_attention_heads, config.hidden_size),
        mlp_width=_whole(config, "intermediate_size", "width"),
        image_size=_image_size(size if isinstance(size, (list, tuple)) else (size, size)),
        patch_size=_whole(config, "patch_size", "image_size"),
        eps=_real(config, "layer_norm_eps"),
        act=_known_activation(config.hidden_act),
        **differences,
    )


def _build_blip(config: Any) -> CaptioningModel:
    text = config.text_config
    decoder = TextDecoder(
        width=_whole(text, "hidden_size", "width"),
        features_width=_whole(config.vision_config, "hidden_size", "width"),
        num_layers=_whole(text, "num_hidden_layers", "layers"),
        num_heads=_heads(text.num_attention_heads, text.hidden_size),
        mlp_width=_whole(text, "intermediate_size", "width"),
        vocab_size=_whole(text, "vocab_size", "vocabulary"),
        max_positions=_whole(text, "max_position_embeddings", "positions"),
        eps=_real(text, "layer_norm_eps"),
        act=_known_activation(text.hidden_act),
        hidden_dropout=_real(text, "hidden_dropout_prob"),
        attention_dropout=_real(text, "attention_probs_dropout_prob"),
    )
    return BlipCaptioner(_build_encoder(config.vision_config), decoder)


def _build_vit_gpt2(config: Any) -> CaptioningModel:
    encoder, decoder = config.encoder, config.decoder
    width = _whole(decoder, "n_embd", "width")
    body = GPT2Decoder(
        width=width,
        num_layers=_whole(decoder, "n_layer", "layers"),
        num_heads=_heads(decoder.n_head, width),
        mlp_width=4 * width if not decoder.n_inner else _whole(decoder, "n_inner", "width"),
        vocab_size=_whole(decoder, "vocab_size", "vocabulary"),
        max_positions=_whole(decoder, "n_positions", "positions"),
        eps=_real(decoder, "layer_norm_epsilon"),
        act=_known_activation(decoder.activation_function),
        embedding_dropout=_real(decoder, "embd_pdrop"),
        attention_dropout=_real(decoder, "attn_pdrop"),
        residual_dropout=_real(decoder, "resid_pdrop"),
        scale_by_width=decoder.scale_attn_weights,
        scale_by_layer=decoder.scale_attn_by_inverse_layer_idx,
    )
    vit = _build_encoder(
        encoder,
        qkv_bias=encoder.qkv_bias,
        num_class_tokens=2 if encoder.model_type == "deit" else 1,
    )
    return ViTGPT2Captioner(vit, body)


def _blip_special_ids(config: Any) -> tuple[int, int, int]:
    text = config.text_config  # its eos_token_id is not used by BLIP: captions end with [SEP]
    return text.bos_token_id, text.sep_token_id, text.pad_token_id


def _vit_gpt2_special_ids(config: Any) -> tuple[int, int, int]:
    def first(name: str) -> int:
        for part in (config, config.decoder):
            if getattr(part, name, None) is not None:
                return getattr(part, name)
        raise PretrainedError(f"neither config.json nor its decoder part says {name}")

    has_start = any(
        getattr(part, "decoder_start_token_id", None) is not None
        for part in (config, config.decoder)
    )
    start = first("decoder_start_token_id" if has_start else "bos_token_id")
    return start, first("eos_token_id"), first("pad_token_id")


# By the model_type of config.json.
FAMILIES = {
    "blip": Family(
        name="blip",
        build=_build_blip,
        convert_state=convert_blip,
        special_ids=_blip_special_ids,
        hugging_face_class="BlipForConditionalGeneration",
        image_processor="BlipImageProcessor",
    ),
    "vision-encoder-decoder": Family(
        name="vit_gpt2",
        build=_build_vit_gpt2,
        convert_state=convert_vit_gpt2,
        special_ids=_vit_gpt2_special_ids,
        hugging_face_class="VisionEncoderDecoderModel",
        parts={"encoder": ("vit", "deit"), "decoder": ("gpt2",)},
    ),
}


def _whole(config: Any, name: str, kind: str) -> int:
    value, most = getattr(config, name), _LIMITS[kind]
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(
            f"{name} is {shortened(value)}; expected a whole number from 1 to {most:,}"
        )
    return value


def _real(config: Any, name: str) -> float:
    """A number that is added to a variance, or a share of what is dropped."""
    value = getattr(config, name)
    if type(value) not in (int, float) or not 0 <= value < 1:
        raise ValueError(
            f"{name} is {shortened(value)}; expected a number that is at least 0 and below 1"
        )
    return value


def _image_size(size: Any) -> tuple[int, int]:
    most = _LIMITS["image_size"]
    if len(size) != 2 or not all(type(edge) is int and 1 <= edge <= most for edge in size):
        raise ValueError(
            f"image size {shortened(size)}; expected height and width from 1 to {most:,}"
        )
    return size[0], size[1]


def _heads(num_heads: int, width: int) -> int:
    if type(num_heads) is not int or num_heads < 1 or width % num_heads:
        raise ValueError(
            f"{shortened(num_heads)} attention heads do not divide a width of {width}"
        )
    return num_heads


def _known_activation(name: str) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation {shortened(name)} is not one of {', '.join(ACTIVATIONS)}")
    return name


def _read_config(folder: Path, family: str | None) -> Any:
    path = folder / "config.json"
    _check_files(folder)
    try:
        settings = _read_json(path)
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
            f"{path} says model_type {shortened(model_type)}; expected "
            f"{' or '.join(repr(name) for name in expected)} ({_class_names(expected)})"
            + (f"; recipes.{known.name}_cc3m trains that kind" if known else "")
        )
    _check_kind(path, settings)
    from transformers import CONFIG_MAPPING

    try:
        # From the dictionary: a file may name another one that is to be read in its place.
        return CONFIG_MAPPING[model_type].from_dict(settings)
    except Exception as error:  # transformers has its own kind for every wrong value
        raise PretrainedError(f"{path} is not a usable configuration: {one_line(error)}") from None


def _check_kind(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises PretrainedError for another model than a captioner of the family."""
    family = FAMILIES[settings["model_type"]]
    architectures = settings.get("architectures") or []
    if architectures and (
        not isinstance(architectures, list) or family.hugging_face_class not in architectures
    ):
        raise PretrainedError(
            f"{path} says architectures {shortened(architectures)}; expected "
            f"{family.hugging_face_class}, a captioner"
        )
    for name, kinds in family.parts.items():
        part = settings.get(name)
        kind = part.get("model_type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise PretrainedError(
                f"{path} describes a {family.hugging_face_class} whose {name} is "
                f"{shortened(kind)}; expected a ViT or DeiT encoder and a GPT-2 decoder"
            )


def _class_names(families: list[str]) -> str:
    return ", ".join(FAMILIES[name].hugging_face_class for name in families)


# --- files ----------------------------------------------------------------------------------

# What a checkpoint has beside its weights: configuration, tokenizer, preprocessor, index of shards.
SMALL_FILES = ("*.json", "*.txt", "*.model")

_CONFIGURATIONS = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer_config.json", "special_tokens_map.json",
)
_VOCABULARIES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model",
    "chat_template.*",
)
_MAX_CONFIG_BYTES = 16 * 2**20
_MAX_VOCABULARY_BYTES = 128 * 2**20
_MAX_WEIGHTS_BYTES = 2**37
_MAX_TENSORS = 100_000
_MAX_NAME = 500  # characters


def _check_files(folder: Path) -> None:
    """Raises PretrainedError for a file that is no regular one, is too large, or names code."""
    try:
        for pattern in _VOCABULARIES:
            for path in folder.glob(pattern):
                if path.exists():
                    check_file(path, max_bytes=_MAX_VOCABULARY_BYTES)
        for name in _CONFIGURATIONS:
            path = folder / name
            if path.exists():
                _refuse_code(path, _read_json(path))
    except UnusableFileError as error:
        raise PretrainedError(str(error)) from None
    except OSError as error:
        raise PretrainedError(f"cannot read {folder}: {error}") from None


def _refuse_code(path: Path, settings: dict[str, Any]) -> None:
    parts: list[Any] = [settings]
    while parts:
        part = parts.pop()
        if isinstance(part, dict) and "auto_map" in part:
            raise PretrainedError(
                f"{path} has auto_map, which names Python code to load the model with; this engine "
                f"runs no code from model folders: choose a model without it"
            )
        if isinstance(part, (dict, list)):
            parts += part.values() if isinstance(part, dict) else part


def _read_json(path: Path) -> dict[str, Any]:
    """A configuration; raises PretrainedError, and FileNotFoundError."""
    try:
        settings = json.loads(read_limited(path, _MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise
    except UnusableFileError as error:
        raise PretrainedError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not a configuration: {error}") from None
    if not isinstance(settings, dict):
        raise PretrainedError(f"{path} is not a configuration: expected a JSON object")
    return settings


def _find_folder(name: str, revision: str | None) -> Path:
    try:
        is_folder, exists = Path(name).is_dir(), Path(name).exists()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise PretrainedError(f"{shortened(name)} is no possible folder: {error}") from None
    if is_folder:
        return Path(name)
    if exists or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise PretrainedError(
            f"no model folder at {name!r}; --model takes a folder in Hugging Face's format "
            f"(config.json, model.safetensors, tokenizer and preprocessor files) or a Hub name "
            f"such as Salesforce/blip-image-captioning-base"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    """Fetch a Hub repository's needed files into Hugging Face's cache, or find them there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=[*SMALL_FILES, "*.safetensors"]
        )
        if not list(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(
                name, revision=revision, allow_patterns=[*SMALL_FILES, "pytorch_model*.bin"]
            )
    # RuntimeError: pathlib's, where the cache lies in a home folder and this user has none.
    except (OSError, HfHubHTTPError, HFValidationError, RuntimeError) as error:
        at = f" at revision {revision}" if revision else ""
        raise PretrainedError(
            f"there is no folder {name!r} here, and it cannot be fetched{at} from the Hugging Face "
            f"Hub: {one_line(error)}\n"
            f"Without a network: on a machine that has one, run `hf download {name} --local-dir "
            f"captioner`, copy the folder here and pass --model captioner."
        ) from None
    return Path(folder)


_WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, in fp32 what are weights."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_weights(path)
    return {
        name: tensor.float() if tensor.dtype in _WEIGHT_DTYPES else tensor
        for name, tensor in tensors.items()
    }


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's tensors: one or shards, safetensors before .bin.

    Raises PretrainedError where there are none, or the index of shards is damaged.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{suffix}.index.json"
        if (folder / f"{stem}.{suffix}").exists():
            return [folder / f"{stem}.{suffix}"]
        if index.exists():
            return _read_index(index)
    raise PretrainedError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _read_index(path: Path) -> list[Path]:
    try:
        shards = json.loads(read_limited(path, _MAX_CONFIG_BYTES))["weight_map"].values()
        return [path.with_name(Path(shard).name) for shard in sorted(set(shards))]
    except UnusableFileError as error:
        raise PretrainedError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PretrainedError(
            f"{path} is not an index of shards; expected "
            f'{{"weight_map": {{tensor: file name}}}}; fetch the file anew'
        ) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """A weight file's tensors, as they are stored. Raises PretrainedError if it is damaged."""
    try:
        if path.suffix == ".safetensors":
            tensors, _ = read_tensors(
                path, refuse=lambda name, _: None, max_bytes=_MAX_WEIGHTS_BYTES
            )
        else:
            tensors = _read_bin(path)
        if len(tensors) > _MAX_TENSORS or any(len(name) > _MAX_NAME for name in tensors):
            raise ValueError(
                f"it holds {len(tensors):,} tensors; expected at most {_MAX_TENSORS:,}, with names "
                f"of up to {_MAX_NAME} characters"
            )
        return tensors
    except FileNotFoundError:
        raise PretrainedError(f"{path} is missing, although the index names it") from None
    except Exception as error:  # safetensors and torch have many words for a damaged file
        reason = one_line(error)
        raise PretrainedError(
            f"{reason if str(path) in reason else f'cannot read {path}: {reason}'}; fetch the file "
            f"anew"
        ) from None


def _read_bin(path: Path) -> dict[str, Tensor]:
    """Raises ValueError where it would give more than tensors, or far more bytes than it has."""
    size = check_file(path, max_bytes=_MAX_WEIGHTS_BYTES)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if sum(member.file_size for member in file.infolist()) > size:
                raise ValueError("it is compressed, so it is no published checkpoint")
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        and tensor.device.type == "cpu" and not tensor.is_quantized
        for name, tensor in tensors.items()
    ):
        raise ValueError("it holds more than named tensors, so it is no published checkpoint")
    # A tied tensor has two names, but no other is larger than the bytes that it is made of.
    if sum(tensor.nbytes for tensor in tensors.values()) > 2 * size:
        raise ValueError("its tensors are larger than the file, so it is no published checkpoint")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _fill(model: CaptioningModel, state: dict[str, Tensor], *, source: str) -> None:
    """Give a body on the meta device its tensors; everything must fit exactly."""
    head, embedding = model.tied_head
    stored_apart = head in state and embedding in state
    is_tied = not stored_apart or torch.equal(state[head], state[embedding])
    if is_tied:
        stored = state.get(embedding, state.get(head))
        if stored is not None:
            state[embedding] = state[head] = stored
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    complaints = [f"unknown tensor {name}" for name in sorted(set(state) - set(expected))]
    complaints += [
        f"missing tensor {name}" for name in sorted(expected) if state.get(name) is None
    ]
    complaints += [
        f"{name} is {tuple(state[name].shape)}, config.json says {shape}"
        for name, shape in expected.items()
        if state.get(name) is not None and tuple(state[name].shape) != shape
    ]
    complaints += [
        f"{name} is {tensor.dtype}, expected float32, float16, bfloat16 or float64"
        for name, tensor in state.items() if tensor.dtype != torch.float32
    ]
    if complaints:
        more = [f"and {len(complaints) - 50:,} more"] if len(complaints) > 50 else []
        raise PretrainedError(
            f"the weights in {source} do not fit their configuration:\n  "
            + "\n  ".join([*complaints[:50], *more])
        )
    for name, tensor in state.items():
        # The sum takes one pass and no memory; it may itself overflow.
        if not math.isfinite(tensor.sum()) and not tensor.isfinite().all():
            raise PretrainedError(
                f"the weights in {source} are damaged: {name} holds NaN, infinity or a number "
                f"beyond float32; fetch the files anew"
            )
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    if is_tied:
        _tie_head(model)


def _tie_head(model: CaptioningModel) -> None:
    head, embedding = model.tied_head
    model.get_submodule(head.rpartition(".")[0]).weight = model.get_parameter(embedding)


# --- tokenizer and pixels -------------------------------------------------------------------


_TOKENIZER_FILES = (
    "expected this model's tokenizer.json (or vocab.txt, or vocab.json and merges.txt)"
)


@contextmanager
def _tokenizer_errors(folder: Path) -> Iterator[None]:
    """Any error within the context means that the tokenizer files are unusable."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # Ctrl-C and the like; tokenizers' own, from Rust, is no Exception either
        raise PretrainedError(
            f"{folder} has no usable tokenizer: {one_line(error)}; {_TOKENIZER_FILES}"
        ) from None


def _tokenizer_fingerprint(folder: Path, tokenizer: CaptionTokenizer) -> str:
    with _tokenizer_errors(folder):  # it tokenizes every word of the vocabulary
        return hashlib.sha256(json.dumps(tokenizer.behavior()).encode()).hexdigest()


def _read_tokenizer(folder: Path, config: Any, model: CaptioningModel) -> CaptionTokenizer:
    from transformers import AutoTokenizer

    _check_tokenizer_class(folder, config)
    with _tokenizer_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
        num_special = len(set(tokenizer.all_special_ids))
        # Some wrong settings show only in use.
        tokenizer.decode(tokenizer("a photo", add_special_tokens=False)["input_ids"])
    # Without vocabulary files transformers makes an empty tokenizer, which knows no word.
    num_known, num_embedded = len(tokenizer), len(model.get_parameter(model.tied_head[1]))
    if not num_special < num_known <= num_embedded:
        raise PretrainedError(
            f"{folder} has no usable tokenizer: it knows {num_known} ids, the model "
            f"{num_embedded}; {_TOKENIZER_FILES}"
        )
    start_id, end_id, pad_id = FAMILIES[config.model_type].special_ids(config)
    ids = (start_id, end_id, pad_id)
    if not all(type(token) is int and 0 <= token < num_embedded for token in ids):
        raise PretrainedError(
            f"{folder / 'config.json'} gives start, end and pad tokens as {shortened(ids)}; "
            f"expected three ids below {num_embedded}"
        )
    return CaptionTokenizer(
        tokenizer,
        start_id=start_id,
        end_id=end_id,
        pad_id=pad_id,
        max_positions=model.decoder.max_positions,
    )


def _check_tokenizer_class(folder: Path, config: Any) -> None:
    """AutoTokenizer would call whatever class of transformers a file names."""
    import transformers

    path = folder / "tokenizer_config.json"
    settings = _read_json(path) if path.exists() else {}
    for name in (settings.get("tokenizer_class"), getattr(config, "tokenizer_class", None)):
        kind = getattr(transformers, name, None) if isinstance(name, str) else name
        if kind is not None and not (
            isinstance(kind, type) and issubclass(kind, transformers.PreTrainedTokenizerBase)
        ):
            raise PretrainedError(
                f"{folder} has no usable tokenizer: tokenizer_class is {shortened(name)}; expected "
                f"a tokenizer of transformers"
            )


# What transformers' preprocessors do where their settings say nothing.
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
    "CLIPImageProcessor": {
        "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": 224,
        "default_to_square": False, **_CLIP,
    },
}


def _read_pixel_settings(folder: Path, config: Any, model: CaptioningModel) -> PixelSettings:
    """The preprocessor's settings; its pixels must have the size that the encoder takes."""
    try:
        given = _preprocessor_of(folder)
        settings = _pixel_settings(given, FAMILIES[config.model_type].image_processor)
    except (OSError, ValueError) as error:
        raise PretrainedError(
            f"{folder} has no usable preprocessor_config.json: {one_line(error)}"
        ) from None
    image_size = model.encoder.image_size
    if settings.size != image_size:
        raise PretrainedError(
            f"{folder}: the preprocessor makes images of {settings.size}, but the encoder in "
            f"config.json takes {image_size} (height, width)"
        )
    return settings


def _preprocessor_of(folder: Path) -> dict[str, Any]:
    """The settings that the folder gives, in its own file or in that of text and images."""
    path = folder / "processor_config.json"
    given = _read_json(path).get("image_processor") if path.exists() else None
    given = _read_json(folder / "preprocessor_config.json") if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f"image_processor is {shortened(given)}; expected a JSON object")
    return given


def _pixel_settings(given: Mapping[str, Any], default_kind: str | None) -> PixelSettings:
    """What transformers' class of this name does with these settings; raises ValueError."""
    kind = given.get("image_processor_type")
    if kind is None:  # as older versions call it
        kind = given.get("feature_extractor_type") or default_kind
        kind = str(kind).replace("FeatureExtractor", "ImageProcessor")
    name = str(kind).removesuffix("Fast").removesuffix("Pil")
    if name not in PREPROCESSORS:
        raise ValueError(
            f"image_processor_type is {shortened(kind)}; expected one of {', '.join(PREPROCESSORS)}"
        )
    settings = {**_ALL_PREPROCESSORS, **PREPROCESSORS[name], **given}
    if not settings["do_resize"]:
        raise ValueError("do_resize is not true, so that images would differ in size")
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
    """(height, width), or the length of the shortest edge, in all spellings of transformers."""
    if isinstance(size, dict) and size.keys() == {"height", "width"}:
        size = [size["height"], size["width"]]
    elif isinstance(size, dict) and size.keys() == {"shortest_edge"}:
        size, is_square = size["shortest_edge"], False
    if isinstance(size, list):
        return _image_size(size)
    height, width = _image_size((size, size))
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
