"""Absorbed against projected cross-attention of one layer, by caption length.

    python -m benchmarks.cross_attention --model blip        577 image tokens
    python -m benchmarks.cross_attention --model vit_gpt2    197 image tokens

Both forms are timed as `lora_engine.models.cross_attention.attend` runs them, with
adapters on keys and values: forward to the context, and backward to the gradients of the query and
the adapters. The crossing is the length at which both take the same time, interpolated linearly
between measured lengths. It is printed with the length up to which the engine uses the absorbed
form (0 on a GPU, where it always projects). On a GPU, --cuda_graph times what recorded steps cost.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import plots
from benchmarks.measure import (
    Spread,
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
from lora_engine.devices import autocast
from lora_engine.models import cross_attention as engine

NUM_IMAGE_TOKENS = {"blip": 577, "vit_gpt2": 197}
WIDTH, NUM_HEADS, RANK = 768, 12, 8
LENGTHS = (8, 12, 16, 20, 24, 28, 32, 40, 48, 64)
QUICK = {"width": 64, "num_heads": 4, "num_image_tokens": 17}
FORMS = ("absorbed", "projected")
PASSES = ("forward", "forward and backward")


def main(argv: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument(
        "--cuda_graph", action="store_true", help="time the GPU's work without the launches"
    )
    arguments = read_flags(parser, argv)
    sizes = {
        "width": WIDTH, "num_heads": NUM_HEADS,
        "num_image_tokens": NUM_IMAGE_TOKENS[arguments.model],
    }
    lengths: tuple[int, ...] = LENGTHS
    if arguments.quick:
        sizes, lengths = QUICK, LENGTHS[::3]
    contenders: dict[str, Callable[[int], float]] = {}
    for length in lengths:
        calls = attention_calls(
            arguments.batch_size, length, device=arguments.device, dtype=arguments.dtype, **sizes
        )
        for passes, call in calls.items():
            for form in FORMS:
                contenders[f"{length} {form} {passes}"] = partial(_time_ms, call, form, arguments)
    figures = interleave(contenders, num_rounds=arguments.rounds, show=False)

    image = sizes["num_image_tokens"], sizes["width"]
    result: dict[str, Any] = {"sizes": sizes, "cuda_graph": arguments.cuda_graph}
    rows = [["T", *(f"{form}, {passes}" for passes in PASSES for form in (*FORMS, "ratio"))]]
    for length in lengths:
        row = [str(length)]
        for passes in PASSES:
            absorbed, projected = (figures[f"{length} {form} {passes}"] for form in FORMS)
            times = {
                "absorbed_ms": spread(absorbed),
                "projected_ms": spread(projected),
                "ratio": ratios(absorbed, projected),
            }
            result.setdefault("passes", {}).setdefault(passes, {})[length] = times
            row += [f"{figure['median']:.3f}" for figure in times.values()]
        rows.append(row)
    crossings = []
    for passes, with_backward in zip(PASSES, (False, True)):
        measured = crossing({
            length: times["ratio"] for length, times in result["passes"][passes].items()
        })
        rule = longest_absorbed(
            image, sizes["num_heads"], with_backward=with_backward, device=arguments.device
        )
        result.setdefault("crossing", {})[passes] = {"measured": measured, "rule": rule}
        where = "outside the measured lengths" if measured is None else f"{measured:.0f}"
        crossings.append(f"{passes} {where} (rule: {rule})")
    finish(
        "cross_attention", arguments, result,
        text=f"milliseconds, {image[0]} image tokens, medians\n{table(rows)}",
        headline=f"crossing at T, {image[0]} image tokens: {'; '.join(crossings)}",
        draw=lambda axes: _draw(axes, result),
    )


def attention_calls(
    num_images: int,
    num_tokens: int,
    *,
    width: int,
    num_heads: int,
    num_image_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Callable[[], object]]:
    """By passes, a function that attends once, in the form that the engine chooses."""
    def draw(*shape: int, trained: bool = False) -> Tensor:
        x = torch.randn(shape, device=device, dtype=dtype) * shape[-1] ** -0.5
        return x.requires_grad_(trained)

    query = draw(num_images, num_tokens, width, trained=True)
    features = draw(num_images, num_image_tokens, width)
    low_rank = (num_images, num_image_tokens, RANK)
    matrices = [
        draw(*shape, trained=True) for shape in (low_rank, (width, RANK)) for _ in range(2)
    ]
    key, value = (
        engine.FeatureProjection(draw(width, width), draw(width), *pair)
        for pair in zip(matrices[:2], matrices[2:])
    )
    gradient = draw(num_images, num_tokens, width)

    def attend() -> Tensor:
        with autocast(device, dtype):
            return engine.attend(
                query, features, key, value,
                num_heads=num_heads, scale=(width // num_heads) ** -0.5,
            )

    def forward_and_backward() -> object:
        return torch.autograd.grad(attend(), [query, *matrices], gradient)

    return dict(zip(PASSES, (torch.no_grad()(attend), forward_and_backward)))


def crossing(ratios_by_length: dict[int, Spread]) -> float | None:
    """The length at which the median ratio reaches 1; None outside the measured lengths."""
    points = [(length, ratio["median"]) for length, ratio in ratios_by_length.items()]
    for (length, ratio), (next_length, next_ratio) in zip(points, points[1:]):
        if ratio < 1 <= next_ratio:
            return length + (next_length - length) * (1 - ratio) / (next_ratio - ratio)
    return None


def longest_absorbed(
    image: tuple[int, int], num_heads: int, *, with_backward: bool, device: torch.device
) -> int:
    """The length up to which the engine absorbs; 0 on a GPU, where it always projects."""
    return next(
        length for length in count(1)
        if not engine.absorbs(
            (length, image[1]), image, num_heads,
            with_backward=with_backward, on_cpu=device.type == "cpu",
        )
    ) - 1


def _time_ms(call: Callable[[], object], form: str, arguments: Any, _: int) -> float:
    least_s = 0.02 if arguments.quick else 0.2
    with mock.patch.object(engine, "absorbs", lambda *_, **__: form == "absorbed"):
        if arguments.cuda_graph:
            call = replayed(call, arguments.device)
        return 1e3 * seconds_a_call(call, arguments.device, least_s=least_s)


def _draw(axes: Any, result: dict[str, Any]) -> None:
    for color, form in enumerate(FORMS):
        for passes, style in zip(PASSES, ("--", "-")):
            times = result["passes"][passes]
            plots.line(
                axes, list(times), [figures[f"{form}_ms"] for figures in times.values()],
                label=f"{form}, {passes}", linestyle=style, color=f"C{color}",
            )
    for crossing in result["crossing"].values():
        axes.axvline(crossing["rule"], color="grey", linewidth=1, linestyle=":")
    axes.set(xlabel="caption tokens; dotted: the engine switches", ylabel="ms", ylim=(0, None))
    axes.legend()


if __name__ == "__main__":
    main()
