"""Captions per second, greedy and with 4 beams: ours against Hugging Face's `generate`.

    python -m benchmarks.generate --model blip
    python -m benchmarks.generate --model vit_gpt2 --device cuda --merge
    python -m benchmarks.generate --as_shipped --encoder_precision bf16 int8

Both sides caption pixels in memory, including the encoder, with the same adapter of rank 8 on all
decoder linears, unmerged unless --merge; ours also captions kept features. BLIP's encoder in
transformers gets SDPA patched in, as an expert would do. With --as_shipped both sides are what a
user gets: transformers and PEFT as they are, and our adapter merged, as `lora_engine caption` does.
With --encoder_precision ours also runs with these encoders, whose captions may differ.

With random weights a caption hardly ever ends, so each has MAX_NEW_TOKENS new tokens. The number of
captions that are equal on both sides, token by token, is printed: all of them in fp32; in bf16 some
differ, because random weights make many words about equally likely. Random weights also caption
most images alike (see the number of distinct captions), so tests/test_generation.py, not this
benchmark, compares how captions depend on images.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, plots
from benchmarks.contenders import Case, checkpoint, make_case
from benchmarks.measure import (
    cells,
    finish,
    flags,
    interleave,
    ratios,
    read_flags,
    spread,
    table,
    wait_for,
)
from lora_engine.captioning.generation import generate
from lora_engine.data.pixels import normalize
from lora_engine.devices import autocast
from lora_engine.features.encoder import FeatureEncoder
from lora_engine.features.precision import EncoderPrecision
from lora_engine.lora.adapter import load_adapter
from lora_engine.lora.injection import cast_frozen, merge
from lora_engine.models.pretrained import Captioner, load_model

MAX_NEW_TOKENS = 20
IDS = {"blip": (30522, 102, 0), "vit_gpt2": (50256, 50256, 50256)}  # start, end, pad
SEARCHES = {"greedy": 1, "4 beams": 4}
PEER = "Hugging Face"

Caption = Callable[[slice, int], Tensor]  # which images, number of beams -> token ids


def main(argv: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights")
    parser.add_argument(
        "--as_shipped", action="store_true",
        help="both as users get them: no SDPA patched in, ours merged",
    )
    parser.add_argument(
        "--encoder_precision", nargs="*", choices=["fp32", "bf16", "int8"], default=[],
        help="ours with these encoders, too",
    )
    arguments = read_flags(parser, argv)
    if arguments.quick:
        arguments.images = 4
    with checkpoint(arguments.model, small=arguments.quick) as folder:
        case = make_case(folder, arguments, num_rows=arguments.images)
        theirs = hugging_face(case, merged=arguments.merge, sdpa=not arguments.as_shipped)
        captioners = ours(
            case,
            merged=arguments.merge or arguments.as_shipped,
            encoder_precisions=arguments.encoder_precision,
        )
    captioners[PEER] = theirs

    searches: dict[str, Any] = {}
    rows = [["captions/s", "median", "min", "max"]]
    for search, num_beams in SEARCHES.items():
        print(f"{search}:")
        searches[search] = _compare(captioners, num_beams, case, num_rounds=arguments.rounds)
        rows += _rows(search, searches[search], num_images=arguments.images)
    speeds = {
        f"{search}, {name}": figures
        for search, result in searches.items() for name, figures in result["captions_per_s"].items()
    }
    finish(
        "generate", arguments,
        {
            "num_images": arguments.images, "max_new_tokens": MAX_NEW_TOKENS,
            "merged": arguments.merge, "as_shipped": arguments.as_shipped, "searches": searches,
        },
        text=table(rows),
        headline=f"{PEER}'s speed: " + ", ".join(
            f"{search} {result['over_hugging_face']['ours']['median']:.2f} x "
            f"({result['num_the_same']['ours']} of {arguments.images} captions the same)"
            for search, result in searches.items()
        ),
        draw=lambda axes: plots.bars(axes, speeds, "captions/s"),
    )


def hugging_face(case: Case, *, merged: bool, sdpa: bool) -> Caption:
    """transformers with PEFT; writes its adapter into the case's folder, for ours to load."""
    model: Any = peers._lora_model(
        case.folder, case.model, case.device, case.dtype, dropout=0.0, seed=0
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for name, matrix in model.named_parameters():
        if "lora_B" in name:  # zeros would change nothing
            matrix.data.copy_(0.02 * torch.randn(matrix.shape, generator=generator))
    model.save_pretrained(case.folder / "adapter")
    if merged:
        model.merge_adapter()
    encoder, decoder = peers._halves(model, case.model)
    if sdpa:
        peers._patch_sdpa(encoder)
    decoder.config.use_cache = True  # off for training
    pixels = torch.from_numpy(case.rows.pixels).to(case.device)

    def caption(images: slice, num_beams: int) -> Tensor:
        with autocast(case.device, case.dtype):
            return model.generate(
                pixel_values=normalize(pixels[images], case.settings),
                num_beams=num_beams,
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )

    return caption


def ours(
    case: Case, *, merged: bool, encoder_precisions: Sequence[EncoderPrecision]
) -> dict[str, Caption]:
    """This engine with that adapter: from pixels, with other encoders, too, and from features."""
    model = load_model(case.folder)
    load_adapter(model, case.folder / "adapter")
    if merged:
        merge(model)
    no_tokenizer: Any = None
    captioner = Captioner(model, no_tokenizer, case.settings, "", "", Path(), None, {})
    encoder_of = partial(FeatureEncoder, captioner, device=case.device, dtype=case.dtype)
    model.to(case.device)
    encoders = {  # of the weights before they are cast
        f"ours, {precision} encoder": encoder_of(precision=precision)
        for precision in encoder_precisions
    }
    cast_frozen(model, case.dtype)
    encoders = {"ours": encoder_of(), **encoders}
    pixels = torch.from_numpy(case.rows.pixels)
    start_id, end_id, pad_id = IDS[case.model]

    def caption(features: Tensor, num_beams: int) -> Tensor:
        with autocast(case.device, case.dtype):
            return generate(
                model, features, prompt_ids=[start_id], end_id=end_id, pad_id=pad_id,
                num_beams=num_beams, max_new_tokens=MAX_NEW_TOKENS,
            )

    def encode(encoder: FeatureEncoder, images: slice) -> Tensor:
        return encoder.unpack(encoder.encode(pixels[images]))

    def from_pixels(encoder: FeatureEncoder) -> Caption:
        return lambda images, num_beams: caption(encode(encoder, images), num_beams)

    features = torch.cat([encode(encoders["ours"], images) for images in _batches(case)])
    return {
        **{name: from_pixels(encoder) for name, encoder in encoders.items()},
        "ours, features": lambda images, num_beams: caption(features[images], num_beams),
    }


def _compare(
    captioners: dict[str, Caption], num_beams: int, case: Case, *, num_rounds: int
) -> dict[str, Any]:
    """Speeds of one search, their ratios to the peer's, and whose captions equal the peer's."""
    outcomes: dict[str, list[list[int]]] = {}
    figures = interleave(
        {
            name: partial(_captions_per_s, name, caption, num_beams, case, outcomes)
            for name, caption in captioners.items()
        },
        num_rounds=num_rounds,
    )
    return {
        "captions_per_s": {name: spread(speeds) for name, speeds in figures.items()},
        "over_hugging_face": {
            name: ratios(speeds, figures[PEER]) for name, speeds in figures.items() if name != PEER
        },
        "num_the_same": {
            name: sum(map(list.__eq__, outcomes[name], outcomes[PEER])) for name in outcomes
        },
        "num_distinct": {
            name: len(set(map(tuple, captions))) for name, captions in outcomes.items()
        },
    }


def _captions_per_s(
    name: str,
    caption: Caption,
    num_beams: int,
    case: Case,
    outcomes: dict[str, list[list[int]]],
    _: int,
) -> float:
    wait_for(case.device)
    begin_s = time.perf_counter()
    tokens = [caption(images, num_beams) for images in _batches(case)]
    wait_for(case.device)
    seconds = time.perf_counter() - begin_s
    outcomes[name] = [row for batch in tokens for row in batch.tolist()]
    return len(outcomes[name]) / seconds


def _rows(search: str, result: dict[str, Any], *, num_images: int) -> list[list[str]]:
    """Rows of the printed table for one search."""
    the_same, distinct = result["num_the_same"], result["num_distinct"]
    return [
        *(
            cells(f"{search}, {name}", speeds)
            for name, speeds in result["captions_per_s"].items()
        ),
        *(
            cells(
                f"  {name} / {PEER} ({the_same[name]} of {num_images} captions the same, "
                f"{distinct[name]} distinct)", ratio,
            )
            for name, ratio in result["over_hugging_face"].items()
        ),
    ]


def _batches(case: Case) -> list[slice]:
    size = case.batch_size
    return [slice(begin, begin + size) for begin in range(0, len(case.rows.pixels), size)]


if __name__ == "__main__":
    main()
