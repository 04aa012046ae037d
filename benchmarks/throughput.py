"""Images a second of training steps: this engine beside PEFT on transformers, in one run.

    python -m benchmarks.throughput --model blip --batch_size 8 --rounds 5
    python -m benchmarks.throughput --model vit_gpt2 --quick

Both sides train LoRA (rank 8, dropout 0) on all decoder linears of the same full-size checkpoint
with random weights, on the same batches in the same order, from pixels in memory. The peer, B2, is
a plain PEFT loop as a careful person writes it: encoder as transformers ships it under no_grad,
captions padded to the batch with -100 labels, fused AdamW. Ours is the step of
lora_engine.training.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.checkpoints import MODELS, write_checkpoint
from benchmarks.measure import interleave, spread, table, write_result
from lora_engine.batches import Collate, Example, epoch_batches
from lora_engine.devices import autocast, describe, resolve_device, resolve_dtype
from lora_engine.images import PixelSettings, normalize
from lora_engine.lora import cast_frozen, inject, lora_parameters
from lora_engine.optim import build_optimizer, optimizer_step
from lora_engine.pretrained import load_body
from lora_engine.training import accumulate_gradients

START_ID, FIRST_WORD_ID, END_ID = 1, 200, 102  # any ids do: the weights are random
RANK = 8


class Rows:
    """Random pixels, and captions as long as CC3M's: 5 to 30 tokens, about 13 on average."""

    def __init__(self, num_rows: int, image_size: tuple[int, int], seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.pixels = generator.integers(0, 256, (num_rows, 3, *image_size), dtype=np.uint8)
        lengths = np.clip(generator.gamma(6, 2, num_rows).astype(int) + 1, 5, 30)
        self.captions = [
            np.array([START_ID, *generator.integers(FIRST_WORD_ID, 30000, n), END_ID])
            for n in lengths
        ]
        self.lengths = np.array([len(caption) for caption in self.captions])


def ours(
    folder: Path, rows: Rows, settings: PixelSettings, arguments: argparse.Namespace
) -> Callable[[int], float]:
    """One call trains an epoch of the rows -> images/s."""
    device, dtype = arguments.device, arguments.dtype
    model = load_body(folder)
    inject(model, ["attention", "feed_forward"], rank=RANK, dropout=0.0)
    cast_frozen(model, dtype)
    model.to(device).train()
    parameters = list(lora_parameters(model).values())
    optimizer = build_optimizer(parameters, lr=1e-4, weight_decay=0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    collate = Collate(prompt_length=1, pad_id=0)

    def epoch(number: int) -> float:
        _wait_for(device)
        begin_s = time.perf_counter()
        for indices in epoch_batches(
            rows.lengths, batch_size=arguments.batch_size, seed=0, epoch=number
        ):
            batch = collate([
                Example(int(i), rows.pixels[i], rows.captions[i], ()) for i in indices
            ])
            loss = accumulate_gradients(
                model, [batch], pixels=settings, device=device, dtype=dtype, scaler=scaler
            )
            optimizer_step(optimizer, scaler, parameters, loss, lr=1e-4, max_grad_norm=1.0)
        _wait_for(device)
        return len(rows.lengths) / (time.perf_counter() - begin_s)

    return epoch


def peft_loop(
    folder: Path, rows: Rows, settings: PixelSettings, arguments: argparse.Namespace
) -> Callable[[int], float]:
    """B2: PEFT on transformers, a plain loop; one call trains an epoch -> images/s."""
    import peft
    from transformers import BlipForConditionalGeneration, VisionEncoderDecoderModel

    device, dtype = arguments.device, arguments.dtype
    is_blip = arguments.model == "blip"
    kind = BlipForConditionalGeneration if is_blip else VisionEncoderDecoderModel
    targets = (
        r"text_decoder\.bert\.encoder\.layer\..*\.(query|key|value|dense)" if is_blip
        else r"decoder\.transformer\.h\..*\.(c_attn|q_attn|c_proj|c_fc)"
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=targets,
        fan_in_fan_out=not is_blip,
    )
    model = peft.get_peft_model(kind.from_pretrained(folder), config).to(device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)

    def loss_of(pixels: Tensor, captions: list[np.ndarray]) -> Tensor:
        longest = max(map(len, captions))
        ids = np.zeros((len(captions), longest), dtype=np.int64)
        labels = np.full((len(captions), longest), -100)
        for i, caption in enumerate(captions):
            ids[i, : len(caption)] = labels[i, : len(caption)] = caption
        input_ids = torch.from_numpy(ids).to(device)
        targets = torch.from_numpy(labels).to(device)
        base: Any = model.base_model.model
        if is_blip:  # shifts the labels itself
            with torch.no_grad():
                features = base.vision_model(pixels).last_hidden_state
            return base.text_decoder(
                input_ids=input_ids, encoder_hidden_states=features, labels=targets
            ).loss
        with torch.no_grad():
            features = base.encoder(pixels)
        return base(
            encoder_outputs=features, decoder_input_ids=input_ids[:, :-1], labels=targets[:, 1:]
        ).loss

    def epoch(number: int) -> float:
        _wait_for(device)
        begin_s = time.perf_counter()
        for indices in epoch_batches(
            rows.lengths, batch_size=arguments.batch_size, seed=0, epoch=number
        ):
            pixels = normalize(torch.from_numpy(rows.pixels[indices]).to(device), settings)
            with autocast(device, dtype):
                loss = loss_of(pixels, [rows.captions[i] for i in indices])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait_for(device)
        return len(rows.lengths) / (time.perf_counter() - begin_s)

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="blip")
    parser.add_argument("--device", default=None, help="default: CUDA if there is one")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model and 2 rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = 2
    arguments.device = resolve_device(arguments.device)
    arguments.dtype = resolve_dtype(arguments.precision, arguments.device)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(arguments.model, folder, small=arguments.quick)
        image_size = load_body(folder).encoder.image_size  # type: ignore[union-attr]
        settings = PixelSettings(image_size, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        rows = Rows(arguments.batch_size * arguments.steps, image_size, seed=0)
        contenders = {
            "ours": ours(folder, rows, settings, arguments),
            "B2: PEFT loop": peft_loop(folder, rows, settings, arguments),
        }
        figures = interleave(contenders, num_rounds=arguments.rounds)
    ratios = [a / b for a, b in zip(figures["ours"], figures["B2: PEFT loop"])]
    result = {
        "benchmark": "throughput",
        "model": arguments.model + (" (small)" if arguments.quick else ""),
        "device": describe(arguments.device),
        "precision": str(arguments.dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "images_per_s": {name: spread(values) for name, values in figures.items()},
        "ours_against_B2": spread(ratios),
        "num_rounds": arguments.rounds,
    }
    print("\n" + _as_table(result))
    suffix = "-quick" if arguments.quick else ""
    path = write_result(
        f"throughput-{arguments.model}-{arguments.device.type}{suffix}", result,
        device=arguments.device,
    )
    print(f"written to {path}")


def _as_table(result: dict) -> str:
    rows = [["images/s", "median", "min", "max"]]
    for name, figures in [*result["images_per_s"].items(),
                          ("ours / B2, in a round", result["ours_against_B2"])]:
        rows.append([name, *(f"{figures[key]:.2f}" for key in ("median", "min", "max"))])
    return (
        f"{result['model']}, batch {result['batch_size']}, {result['precision']}, "
        f"{result['device']}\n" + table(rows)
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
