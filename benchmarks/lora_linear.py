"""Linear layers with LoRA, forward and backward: ours against PEFT's, and without adapters.

    python -m benchmarks.lora_linear --model blip
    python -m benchmarks.lora_linear --model vit_gpt2 --device cuda

The lower bound is the same layers without adapters, with only the gradient of the input: by
F.linear, and by `frozen_linear` ("product" in the results), whose kernels ours uses. Under bf16 all
have frozen weights in bf16 and LoRA matrices in fp32, as in training; ours also has a cast copy of
the matrices, made once per step (optim.py), and PEFT does not cast its input (peers.py). The rows
are the tokens of all captions of a batch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks import plots
from benchmarks.measure import (
    finish,
    flags,
    interleave,
    ratios,
    read_flags,
    replayed,
    seconds_a_call,
    spread,
    table,
)
from benchmarks.ours import ALPHA, RANK
from lora_engine.devices import autocast
from lora_engine.lora.injection import cast_frozen, inject, lora_layers
from lora_engine.lora.layer import project
from lora_engine.training.optim import FlatLoRAParameters

SHAPES: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {  # (in, outs) of layers of one input
    "blip": {
        "query, key, value": (768, (768, 768, 768)), "768 to 768": (768, (768,)),
        "768 to 3072": (768, (3072,)), "3072 to 768": (3072, (768,)),
    },
    "vit_gpt2": {
        "c_attn": (768, (2304,)), "768 to 768": (768, (768,)),
        "768 to 3072": (768, (3072,)), "3072 to 768": (3072, (768,)),
    },
}
NUM_ROWS = (64, 128, 256, 512, 1024, 2048)
DROPOUTS = (0.0, 0.1)
FROZEN = ("F.linear", "product")


def main(argv: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument(
        "--cuda_graph", action="store_true", help="time the GPU's work without the launches"
    )
    arguments = read_flags(parser, argv)
    shapes, all_rows = SHAPES[arguments.model], list(NUM_ROWS)
    if arguments.quick:
        shapes, all_rows = {"64 to 64": (64, (64,))}, list(NUM_ROWS[:2])
    contenders: dict[str, Callable[[int], float]] = {}
    for name, (width, outs) in shapes.items():
        for num_rows in all_rows:
            calls = layer_calls(
                width, outs, num_rows, is_conv1d=arguments.model == "vit_gpt2",
                device=arguments.device, dtype=arguments.dtype,
            )
            for contender, call in calls.items():
                contenders[f"{name}/{num_rows}/{contender}"] = partial(_micros, call, arguments)
    figures = interleave(contenders, num_rounds=arguments.rounds, show=False)

    shown: dict[str, dict[int, Any]] = {name: {} for name in shapes}
    rows = [["microseconds", "rows", *FROZEN, *(
        f"{column}, {dropout}" for dropout in DROPOUTS for column in ("ours", "PEFT", "PEFT/ours")
    )]]
    for name in shapes:
        for num_rows in all_rows:
            times = {
                contender: figures[f"{name}/{num_rows}/{contender}"] for contender in calls
            }
            measured: dict[str, Any] = {
                f"{contender}, us": spread(values) for contender, values in times.items()
            }
            cells = [f"{measured[f'{frozen}, us']['median']:.0f}" for frozen in FROZEN]
            for dropout in DROPOUTS:
                ours, theirs = f"ours {dropout}", f"PEFT {dropout}"
                ratio = ratios(times[theirs], times[ours])
                measured[f"PEFT / ours {dropout}"] = ratio
                cells += [f"{measured[f'{side}, us']['median']:.0f}" for side in (ours, theirs)]
                cells.append(f"{ratio['median']:.2f}")
            shown[name][num_rows] = measured
            rows.append([name, str(num_rows), *cells])
    speedups = [
        measured["PEFT / ours 0.0"]["median"]
        for by_rows in shown.values() for measured in by_rows.values()
    ]
    finish(
        "lora_linear", arguments, {"cuda_graph": arguments.cuda_graph, "shapes": shown},
        text=f"forward and backward, medians; after the comma LoRA's dropout\n{table(rows)}",
        headline=f"without dropout {min(speedups):.2f} to {max(speedups):.2f} times PEFT's speed",
        draw=lambda axes: _draw(axes, shown),
    )


def layer_calls(
    width: int,
    outs: Sequence[int],
    num_rows: int,
    *,
    is_conv1d: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Callable[[], object]]:
    """By contender, a function that runs layers that share an input forward and backward once."""
    x = torch.randn(num_rows, width, device=device, dtype=dtype, requires_grad=True)
    gradients = [torch.randn(num_rows, out, device=device, dtype=dtype) for out in outs]

    def both(forward: Callable[[Tensor], Sequence[Tensor]], matrices: Sequence[Tensor]) -> object:
        with autocast(device, dtype):
            ys = forward(x)
        return torch.autograd.grad(ys, [x, *matrices], gradients)

    plain: Any = _layers(width, outs, False).to(device, dtype).requires_grad_(False)
    calls: dict[str, Callable[[], object]] = {
        "F.linear": partial(both, partial(_call_each, plain), []),
        "product": partial(both, partial(_project, plain), []),
    }
    for dropout in DROPOUTS:
        ours = _layers(width, outs, False)
        inject(ours, r"\d+", rank=RANK, alpha=ALPHA, dropout=dropout)
        cast_frozen(ours, dtype)
        ours.to(device).train()
        # It holds the copies of the LoRA matrices in the compute dtype.
        FlatLoRAParameters((layer for _, layer in lora_layers(ours)), dtype)
        calls[f"ours {dropout}"] = partial(both, partial(_project, ours), _trained(ours))

        theirs = peft.get_peft_model(_layers(width, outs, is_conv1d), peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=r"\d+",
            fan_in_fan_out=is_conv1d,
        ))
        for layer in theirs.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
                layer.get_base_layer().to(dtype)
        theirs.to(device).train()
        adapted: Any = theirs.get_base_model()
        calls[f"PEFT {dropout}"] = partial(both, partial(_call_each, adapted), _trained(theirs))
    return calls


def _layers(width: int, outs: Sequence[int], is_conv1d: bool) -> nn.ModuleList:
    return nn.ModuleList(Conv1D(out, width) if is_conv1d else nn.Linear(width, out) for out in outs)


def _project(layers: nn.ModuleList, x: Tensor) -> Sequence[Tensor]:
    return project(x, *layers)


def _call_each(layers: nn.ModuleList, x: Tensor) -> Sequence[Tensor]:
    return [layer(x) for layer in layers]


def _trained(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _micros(call: Callable[[], object], arguments: Any, number: int) -> float:
    if arguments.cuda_graph:
        call = replayed(call, arguments.device)
    return 1e6 * seconds_a_call(call, arguments.device, least_s=0.02 if arguments.quick else 0.1)


def _draw(axes: Any, shown: dict[str, dict[int, Any]]) -> None:
    for color, (name, by_rows) in enumerate(shown.items()):
        for dropout, style in zip(DROPOUTS, ("-", "--")):
            plots.line(
                axes, list(by_rows),
                [measured[f"PEFT / ours {dropout}"] for measured in by_rows.values()],
                label=f"{name}, dropout {dropout}", linestyle=style, color=f"C{color}",
            )
    axes.set_xscale("log", base=2)
    axes.set(xlabel="rows", ylabel="PEFT's time / ours", ylim=(0, None))
    axes.legend(fontsize="small")


if __name__ == "__main__":
    main()
