"""Hugging Face at the door: weights, tokenizer and pixel settings of a checkpoint come in here.

The only room that imports transformers, and the only one that may read a published `.bin` file
(with weights_only). What comes out are our own bodies with the checkpoint's numbers in them. A
further family is a body in `models/` and a row in `FAMILIES`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_engine.captions import CaptionTokenizer
from lora_engine.images import PixelSettings
from lora_engine.models import CaptionerBody
from lora_engine.models.activations import ACTIVATIONS
from lora_engine.models.blip import BlipCaptioner, TextDecoder
from lora_engine.models.blip import convert_state as convert_blip
from lora_engine.models.vit import VisionTransformer
from lora_engine.models.vit_gpt2 import GPT2Decoder, ViTGPT2Captioner
from lora_engine.models.vit_gpt2 import convert_state as convert_vit_gpt2


class PretrainedError(ValueError):
    """A checkpoint that cannot be found, read, or understood."""


@dataclass
class Captioner:
    """A loaded captioner: the body, and what turns text and images into its inputs.

    `fingerprints` are SHA-256s of what was loaded, whatever files it came from: the weights
    ("base"), the "configuration", the "tokenizer" and the "preprocessor". `name` is the Hub name or
    the folder that was asked for; `folder` holds its files.
    """

    model: CaptionerBody
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
    `hugging_face_class` is what loads the checkpoint in transformers.
    """

    name: str
    build: Callable[[Any], CaptionerBody]
    convert_state: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    special_ids: Callable[[Any], tuple[int, int, int]]
    hugging_face_class: str


def load_captioner(
    name_or_path: str | Path, *, family: str | None = None, revision: str | None = None
) -> Captioner:
    """Load a captioner from a Hugging Face folder or a Hub name, on the CPU, in fp32.

    `family`, a key of `FAMILIES`, refuses other kinds. The body comes in evaluation mode.

    Raises PretrainedError where the folder or name cannot be found (with what to do without a
    network), is no captioner of a known family, or has a tensor too many, too few or of another
    shape than its configuration says.
    """
    folder = _find_folder(str(name_or_path), revision)
    config = _read_config(folder, family)
    model = _load_body(folder, config)
    tokenizer = _read_tokenizer(folder, config, model)
    pixels = _read_pixel_settings(folder, model)
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
            "configuration": _json_fingerprint(settings_of(model)),
            "tokenizer": _json_fingerprint(tokenizer.behavior()),
            "preprocessor": _json_fingerprint(dataclasses.asdict(pixels)),
        },
    )


def load_tokenizer(name: str | Path, *, revision: str | None = None) -> CaptionTokenizer:
    """A captioner's tokenizer, without its weights; raises PretrainedError as `load_captioner`."""
    folder = _find_folder(str(name), revision)
    config = _read_config(folder, None)
    with torch.device("meta"):
        model = FAMILIES[config.model_type].build(config)
    return _read_tokenizer(folder, config, model)


def load_body(folder: str | Path) -> CaptionerBody:
    """The body alone, from a folder that needs no tokenizer or preprocessor files."""
    return _load_body(Path(folder), _read_config(Path(folder), None))


def build_from_config(folder: str | Path) -> CaptionerBody:
    """The body that a folder's config.json describes, with its head tied and no weights filled in.

    Under `torch.device("meta")` it costs no memory: good for counting parameters.
    """
    config = _read_config(Path(folder), None)
    model = FAMILIES[config.model_type].build(config)
    _tie_head(model)
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, shape and fp32 values."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


_HOW = ("training", "gradient_checkpointing")  # attributes that change no result


def settings_of(model: nn.Module) -> dict[str, Any]:
    """All that a body computes with besides weights, as JSON: heads, eps, activations, dropout, ...

    Of torch's own modules it is eps alone; their other attributes follow from the weights' shapes.
    """
    names = {act: name for name, act in reversed(ACTIVATIONS.items())}
    settings: dict[str, Any] = {}
    for path, module in model.named_modules():
        is_ours = type(module).__module__.startswith("lora_engine.")
        for name, value in vars(module).items():
            if name == "eps" or is_ours and not name.startswith("_") and name not in _HOW:
                settings[f"{path}.{name}"] = names[value] if callable(value) else value
    return settings


def _json_fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _load_body(folder: Path, config: Any) -> CaptionerBody:
    family = FAMILIES[config.model_type]
    tensors = _read_tensors(folder)
    try:
        with torch.device("meta"):
            model = family.build(config)
    except (TypeError, ZeroDivisionError, RuntimeError) as error:
        raise PretrainedError(
            f"{folder / 'config.json'} describes no possible model: {_reason(error)}"
        ) from None
    _fill(model, family.convert_state(tensors), source=str(folder))
    return model.eval()


# --- configurations -------------------------------------------------------------------------


def _build_encoder(config: Any, **differences) -> VisionTransformer:
    size = config.image_size
    return VisionTransformer(
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=_heads(config.num_attention_heads, config.hidden_size),
        mlp_width=config.intermediate_size,
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_size=config.patch_size,
        eps=config.layer_norm_eps,
        act=_known_activation(config.hidden_act),
        **differences,
    )


def _build_blip(config: Any) -> CaptionerBody:
    text = config.text_config
    decoder = TextDecoder(
        width=text.hidden_size,
        features_width=config.vision_config.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=_heads(text.num_attention_heads, text.hidden_size),
        mlp_width=text.intermediate_size,
        vocab_size=text.vocab_size,
        max_positions=text.max_position_embeddings,
        eps=text.layer_norm_eps,
        act=_known_activation(text.hidden_act),
        hidden_dropout=text.hidden_dropout_prob,
        attention_dropout=text.attention_probs_dropout_prob,
    )
    return BlipCaptioner(_build_encoder(config.vision_config), decoder)


def _build_vit_gpt2(config: Any) -> CaptionerBody:
    encoder, decoder = config.encoder, config.decoder
    if encoder.model_type not in ("vit", "deit") or decoder.model_type != "gpt2":
        raise PretrainedError(
            f"this VisionEncoderDecoderModel joins {encoder.model_type!r} and "
            f"{decoder.model_type!r}; expected a ViT or DeiT encoder and a GPT-2 decoder"
        )
    body = GPT2Decoder(
        width=decoder.n_embd,
        num_layers=decoder.n_layer,
        num_heads=_heads(decoder.n_head, decoder.n_embd),
        mlp_width=decoder.n_inner or 4 * decoder.n_embd,
        vocab_size=decoder.vocab_size,
        max_positions=decoder.n_positions,
        eps=decoder.layer_norm_epsilon,
        act=_known_activation(decoder.activation_function),
        embedding_dropout=decoder.embd_pdrop,
        attention_dropout=decoder.attn_pdrop,
        residual_dropout=decoder.resid_pdrop,
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
    ),
    "vision-encoder-decoder": Family(
        name="vit_gpt2",
        build=_build_vit_gpt2,
        convert_state=convert_vit_gpt2,
        special_ids=_vit_gpt2_special_ids,
        hugging_face_class="VisionEncoderDecoderModel",
    ),
}


def _heads(num_heads: int, width: int) -> int:
    if num_heads < 1 or width % num_heads:
        raise PretrainedError(f"{num_heads} attention heads do not divide a width of {width}")
    return num_heads


def _known_activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise PretrainedError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return name


def _read_config(folder: Path, family: str | None) -> Any:
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise PretrainedError(
            f"{folder} has no config.json; --model takes a folder in Hugging Face's format "
            f"or a Hub name"
        ) from None
    except (ValueError, AttributeError) as error:
        raise PretrainedError(f"{path} is not a configuration: {error}") from None
    expected = [family] if family else list(FAMILIES)
    if model_type not in expected:
        raise PretrainedError(
            f"{path} says model_type {model_type!r}; expected "
            f"{' or '.join(repr(name) for name in expected)} ({_class_names(expected)})"
            + (f"; recipes.{FAMILIES[model_type].name}_cc3m trains that kind"
               if model_type in FAMILIES else "")
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers has its own kind for every wrong value
        raise PretrainedError(f"{path} is not a usable configuration: {_reason(error)}") from None
    architectures = config.architectures or []
    wanted = FAMILIES[model_type].hugging_face_class
    if architectures and wanted not in architectures:
        raise PretrainedError(
            f"{path} says architectures {architectures}; expected {wanted}, a captioner"
        )
    return config


def _class_names(families: list[str]) -> str:
    return ", ".join(FAMILIES[name].hugging_face_class for name in families)


# --- files ----------------------------------------------------------------------------------

# What a checkpoint has beside its weights: configuration, tokenizer, preprocessor, index of shards.
SMALL_FILES = ("*.json", "*.txt", "*.model")


def _find_folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
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
            f"Hub: {_reason(error)}\n"
            f"Without a network: on a machine that has one, run `hf download {name} --local-dir "
            f"captioner`, copy the folder here and pass --model captioner."
        ) from None
    return Path(folder)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, in fp32."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_weights(path)
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor
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
        shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        return [path.with_name(Path(shard).name) for shard in sorted(set(shards))]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PretrainedError(
            f"{path} is not an index of shards; expected "
            f'{{"weight_map": {{tensor: file name}}}}; fetch the file anew'
        ) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """A weight file's tensors, as they are stored. Raises PretrainedError if it is damaged."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("it holds more than named tensors, so it is no published checkpoint")
        return tensors
    except FileNotFoundError:
        raise PretrainedError(f"{path} is missing, although the index names it") from None
    except Exception as error:  # safetensors and torch have many words for a damaged file
        raise PretrainedError(
            f"cannot read {path}: {_reason(error)}; fetch the file anew"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fill(model: CaptionerBody, state: dict[str, Tensor], *, source: str) -> None:
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
    if complaints:
        raise PretrainedError(
            f"the weights in {source} do not fit their configuration:\n  "
            + "\n  ".join(complaints)
        )
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    if is_tied:
        _tie_head(model)


def _tie_head(model: CaptionerBody) -> None:
    head, embedding = model.tied_head
    model.get_submodule(head.rpartition(".")[0]).weight = model.get_parameter(embedding)


# --- tokenizer and pixels -------------------------------------------------------------------


def _read_tokenizer(folder: Path, config: Any, model: CaptionerBody) -> CaptionTokenizer:
    from transformers import AutoTokenizer

    expected = "expected this model's tokenizer.json (or vocab.txt, or vocab.json and merges.txt)"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever transformers says, it means that the files do not serve
        raise PretrainedError(
            f"{folder} has no usable tokenizer: {_reason(error)}; {expected}"
        ) from None
    # Without vocabulary files transformers makes an empty tokenizer, which knows no word.
    num_known, num_embedded = len(tokenizer), len(model.get_parameter(model.tied_head[1]))
    if not len(set(tokenizer.all_special_ids)) < num_known <= num_embedded:
        raise PretrainedError(
            f"{folder} has no usable tokenizer: it knows {num_known} ids, the model "
            f"{num_embedded}; {expected}"
        )
    start_id, end_id, pad_id = FAMILIES[config.model_type].special_ids(config)
    if not all(isinstance(token, int) for token in (start_id, end_id, pad_id)):
        raise PretrainedError(
            f"{folder / 'config.json'} gives start, end and pad tokens as {start_id}, {end_id} and "
            f"{pad_id}; expected three ids"
        )
    return CaptionTokenizer(
        tokenizer,
        start_id=start_id,
        end_id=end_id,
        pad_id=pad_id,
        max_positions=model.decoder.max_positions,
    )


def _read_pixel_settings(folder: Path, model: CaptionerBody) -> PixelSettings:
    """The preprocessor's settings; its pixels must have the size that the encoder takes."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
        settings = PixelSettings(
            resize=size.shortest_edge or (size.height, size.width),
            resample=int(processor.resample),
            crop=(crop.height, crop.width) if crop else None,
            rescale_factor=processor.rescale_factor if processor.do_rescale else 1.0,
            mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        )
    except Exception as error:  # as above
        raise PretrainedError(
            f"{folder} has no usable preprocessor_config.json: {_reason(error)}"
        ) from None
    image_size = model.encoder.image_size
    if settings.size != image_size:
        raise PretrainedError(
            f"{folder}: the preprocessor makes images of {settings.size}, but the encoder in "
            f"config.json takes {image_size} (height, width)"
        )
    return settings
