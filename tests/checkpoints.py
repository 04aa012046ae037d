"""Small random checkpoints of both families, in the format of the published ones.

Two layers, width 64, four heads, 64-pixel images. The tokenizers are small, but of the published
kinds, with their peculiarities: BLIP's start token is beyond its tokenizer's own ids, GPT-2's
start, end and padding are one id, and its tokenizer file asks for padding and truncation.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from published import (
    BLIP,
    BLIP_PREPROCESSOR,
    BLIP_TOKENIZER,
    VIT_GPT2,
    VIT_GPT2_PREPROCESSOR,
    VIT_GPT2_TOKENIZER,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, WordPiece
from torch import Tensor, nn

from lora_engine.captioning.image_captioner import ImageCaptioner
from lora_engine.models.pretrained import Captioner

IMAGE_SIZE = 64
MAX_POSITIONS = 96

WORDS = (
    "a an the of in on at and with is are to by man woman dog cat house tree street city sea beach"
    " person people sky water red green blue yellow white black small large big tiny circle square"
    " triangle star above below left right beside photo picture image view sunset background stock"
    " vector player game team day night road car train boat bird flower food table room building"
    " mountain lake river snow sun young old new front top bottom two three one"
).split()

CAPTIONS = [
    "a red circle above a blue square",
    "a dog on the beach at sunset",
    "two people",
    "the view of a city street with a car, a train and white building at night",
    "a small green triangle left of a large yellow star in the picture",
    "flower on the table",
]


def write_blip(folder: Path, *, text: dict | None = None, vision: dict | None = None, seed=0):
    """A small BLIP; `text` and `vision` change its configuration. Returns Hugging Face's model."""
    tokens = _blip_tokens()
    config = copy.deepcopy(BLIP)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "projection_dim": 64}
    config["text_config"] |= small | {
        "max_position_embeddings": MAX_POSITIONS,
        "vocab_size": len(tokens) + 2,
        "bos_token_id": len(tokens),
        "sep_token_id": tokens.index("[SEP]"),
    } | (text or {})
    config["vision_config"] |= small | {"image_size": IMAGE_SIZE} | (vision or {})
    config |= {"projection_dim": 64, "image_text_hidden_size": 64}
    model = _save(config, folder, seed)
    _write_blip_tokenizer(folder, tokens)
    _write_json(folder / "preprocessor_config.json", BLIP_PREPROCESSOR | {"size": IMAGE_SIZE})
    return model


def write_vit_gpt2(
    folder: Path, *, encoder: dict | None = None, decoder: dict | None = None, seed=0
):
    """A small ViT+GPT2; `encoder` and `decoder` change its configuration. Returns the model."""
    vocabulary, merges = _gpt2_vocabulary()
    end = vocabulary["<|endoftext|>"]
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
           "decoder_start_token_id": end}
    config = copy.deepcopy(VIT_GPT2) | ids
    small = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": IMAGE_SIZE,
    }
    kind = (encoder or {}).get("model_type", "vit")
    published = config["encoder"] if kind in ("vit", "deit") else {}
    # A Swin has depths and widths of its own.
    config["encoder"] = published | ({} if kind == "swin" else small) | (encoder or {})
    config["decoder"] |= ids | {
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": MAX_POSITIONS,
        "vocab_size": len(vocabulary),
    } | (decoder or {})
    model = _save(config, folder, seed)
    _write_gpt2_tokenizer(folder, vocabulary, merges)
    _write_json(folder / "preprocessor_config.json", VIT_GPT2_PREPROCESSOR | {"size": IMAGE_SIZE})
    return model


def write_one(folder: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    """Store tensors in one file, "safetensors" or "bin"."""
    if suffix == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")


def write_shards(folder: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    """Store tensors in two files and an index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for shard, its_names in shards.items():
        part = {name: tensors[name] for name in its_names}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / shard)
    weight_map = {name: shard for shard, its_names in shards.items() for name in its_names}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def varied(
    captioner: Captioner | ImageCaptioner, theirs: nn.Module, *, raised: SimpleNamespace
) -> None:
    """Change our model and Hugging Face's in the same way, so that captions differ, and end.

    Cross-attention is made to matter, and the end token's logit is raised by `raised.amount`.
    """
    end_id = captioner.tokenizer.end_id

    def raise_end(module, inputs, logits):
        return logits + raised.amount * (torch.arange(logits.shape[-1]) == end_id)

    for model in (captioner.model, theirs):
        head = captioner.model.tied_head[0].removesuffix(".weight")
        model.get_submodule(head).register_forward_hook(raise_end)
        for name, parameter in model.named_parameters():
            if "crossattention" in name and parameter.dim() == 2:
                parameter.data *= 4


def hugging_face(folder: Path) -> nn.Module:
    """Hugging Face's own model of a checkpoint folder, in evaluation mode."""
    import transformers

    config = json.loads((Path(folder) / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    return kind.from_pretrained(folder).eval()


def hugging_face_logits(model: nn.Module, pixels: Tensor, input_ids: Tensor) -> Tensor:
    """Logits (N, T, V) of Hugging Face's model, with or without PEFT."""
    name = "input_ids" if model.config.model_type == "blip" else "decoder_input_ids"
    return model(pixel_values=pixels, **{name: input_ids}).logits


def randomize(model: nn.Module, seed: int) -> None:
    """Draw every weight: class defaults leave some at zero or near it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if any(part in name.lower() for part in ("norm", ".ln_", "lambda")):
                parameter.copy_(float(not name.endswith("bias")) + 0.05 * noise)
            elif parameter.dim() < 2:
                parameter.copy_(0.02 * noise)
            else:
                parameter.copy_(0.5 * parameter.shape[-1] ** -0.5 * noise)


def random_pixels(num_images: int, *, seed: int = 0, size: int = IMAGE_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_images, 3, size, size, generator=generator)


def _save(config: dict, folder: Path, seed: int) -> nn.Module:
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    model = kind(kind.config_class.from_dict(copy.deepcopy(config)))
    randomize(model, seed)
    model.tie_weights()
    model.save_pretrained(folder)
    # The published folders have no generation_config.json.
    (folder / "generation_config.json").unlink(missing_ok=True)
    return model.eval()


def _blip_tokens() -> list[str]:
    """Like BERT's vocabulary: padding first, then unused and other special tokens."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    unused = [f"[unused{index}]" for index in range(9)]
    special = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return list(dict.fromkeys(special + letters + [f"##{x}" for x in letters] + list(WORDS)))


def _write_blip_tokenizer(folder: Path, tokens: list[str]) -> None:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    around = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=around
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", BLIP_TOKENIZER)


def _gpt2_vocabulary() -> tuple[dict[str, int], list[list[str]]]:
    """Byte-level pairs of a few captions; the end token comes last, as in GPT-2's own."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CAPTIONS, " ".join(WORDS)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"] | {"<|endoftext|>": len(model["vocab"])}, model["merges"]


def _write_gpt2_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[list[str]]
) -> None:
    tokenizer = Tokenizer(BPE(vocabulary, [tuple(pair) for pair in merges]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.enable_truncation(32)
    end = vocabulary["<|endoftext|>"]
    tokenizer.enable_padding(length=32, pad_id=end, pad_token="<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", VIT_GPT2_TOKENIZER)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
