"""What it costs to train in many processes of torchrun, all on this machine.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --quick

- Runs of the engine take turns: one process without torchrun, one and two with it. Features are on
  disk, so every epoch is a later one. Figures are those of the steps, from the third on.
- The vote on a step and the exchange of gradients are timed in these runs. The exchange is also
  timed alone, begun by both processes together, without their different loads.
- The balance is computed: the mean over micro-batches of a step of rows x longest caption, divided
  by their maximum, averaged over the steps of an epoch.
- Encoded images are counted on the small model: their number does not depend on its size.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import checkpoint
from benchmarks.measure import MODELS, Spread, interleave, ratios, spread, table, write_result
from benchmarks.processes import in_processes, write_rows
from benchmarks.rows import Rows
from lora_engine.data.batches import training_steps
from lora_engine.lora.injection import inject
from lora_engine.models.pretrained import load_model

RANK = 8
NUM_WARM_UPS = 2  # steps of a run that do not count
RUNS: dict[str, tuple[int | None, dict[str, int]]] = {  # processes of torchrun, settings
    "no torchrun": (None, {"num_threads": 2}),
    "one of torchrun": (1, {"num_threads": 2}),
    "two micro-batches": (None, {"num_threads": 2, "micro_batches": 2}),
    "two of torchrun": (2, {"num_threads": 1}),
}
COUNTED = [(2, 1), (2, 5), (4, 1), (4, 5)]  # processes, captions per image


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", "--checkpoint", choices=MODELS, default="blip", help="its sizes are used"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--images", type=int, default=64, help="of a run of two epochs")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--quick", action="store_true",
        help="check that it runs: a small model, 1 round, meaningless figures",
    )
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.images = 1, 4 * arguments.batch_size
    result: dict[str, Any] = {"benchmark": "ranks", **vars(arguments)}
    result |= training(arguments)
    result["balance"] = balance(Rows(200_000, (1, 1), model=arguments.model).lengths)
    result["encoded"] = encoded(arguments.model, COUNTED[:1] if arguments.quick else COUNTED)
    suffix = "-quick" if arguments.quick else ""
    path = write_result(f"ranks-{arguments.model}{suffix}", result, device=torch.device("cpu"))
    print(f"\n{as_table(result)}\nwritten to {path}")
    print(f"two processes: {result['two_against_one']['median']:.2f} of one with two threads")


# --- runs -----------------------------------------------------------------------------------------


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Images/s of `RUNS`, and the times of what their processes exchange."""
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    with (
        checkpoint(arguments.model, small=arguments.quick) as folder,
        tempfile.TemporaryDirectory() as name,
    ):
        data = Path(name)
        write_rows(data, folder, model=arguments.model, num_images=arguments.images)
        run = partial(
            in_processes, "benchmarks.processes:train_timed",
            checkpoint=str(folder), data=str(data), cache_dir=str(data / "cache"),
            batch_size=arguments.batch_size,
        )
        run(num_processes=None, epochs=1, num_threads=2)  # writes the features

        def images_per_s(name: str, _: int) -> float:
            num_processes, settings = RUNS[name]
            ranks = run(num_processes=num_processes, epochs=2, **settings)
            seen[name] += ranks
            assert max(one["num_encoded"][-1] for one in ranks) == 0
            steps_s = np.diff(ranks[0]["ends_s"])[NUM_WARM_UPS - 1 :]
            return arguments.batch_size * len(steps_s) / steps_s.sum()

        figures = interleave(
            {name: partial(images_per_s, name) for name in RUNS},
            num_rounds=arguments.rounds, num_warm_ups=0,
        )
        num_values = num_trainable(folder)
        alone_s = max(
            in_processes(
                "benchmarks.processes:time_exchange", 2,
                num_values=num_values + 1, num_parts=2, num_rounds=5 if arguments.quick else 50,
            ),
            key=statistics.median,
        )
    return {
        "num_trainable": num_values,
        "images_per_s": {name: spread(values) for name, values in figures.items()},
        "torchrun_against_none": ratios(figures["one of torchrun"], figures["no torchrun"]),
        "two_against_one": ratios(figures["two of torchrun"], figures["no torchrun"]),
        "two_against_two_micro_batches": ratios(
            figures["two of torchrun"], figures["two micro-batches"]
        ),
        "vote_s": slowest(seen["two of torchrun"], "vote_s"),
        "exchange_in_steps_s": slowest(seen["two of torchrun"], "exchange_s"),
        "exchange_s": spread(alone_s),
    }


def slowest(ranks: list[dict[str, Any]], key: str) -> Spread:
    """The times of the process with the largest median."""
    return spread(max((one[key] for one in ranks), key=statistics.median))


def num_trainable(folder: Path) -> int:
    model = load_model(folder)
    return inject(model, ["attention", "feed_forward"], rank=RANK).num_trainable


# --- balance --------------------------------------------------------------------------------------


def balance(lengths: np.ndarray, *, num_ranks: int = 8, batch_size: int = 8) -> dict[str, float]:
    """Mean / maximum of rows x longest caption over the micro-batches of a step, one per process.

    "dealt" is how the engine forms them. "sorted" gives each process a batch of rows of similar
    length, which without processes is the best.
    """
    settings: dict[str, Any] = {
        "batch_size": batch_size, "grad_accum_steps": num_ranks, "seed": 0, "num_epochs": 1
    }
    forms = {
        "dealt": training_steps(lengths, micro_batches=num_ranks, **settings),
        "sorted": training_steps(lengths, micro_batches=None, **settings),
    }
    return {
        name: statistics.mean(
            evenness([[int(lengths[index.row]) for index in batch] for batch in step.micro_batches])
            for step in steps if len(step.rows) == num_ranks * batch_size  # the last may be shorter
        )
        for name, steps in forms.items()
    }


def evenness(micro_batches: list[list[int]]) -> float:
    """Mean / maximum of rows x longest caption, for the lengths of each micro-batch."""
    loads = [len(lengths) * max(lengths) for lengths in micro_batches]
    return statistics.mean(loads) / max(loads)


# --- encoded images -------------------------------------------------------------------------------


def encoded(model: str, cases: list[tuple[int, int]]) -> list[dict[str, float]]:
    """How often an image is encoded in the first and in the second epoch, by all processes."""
    return [encoded_in(model, *case) for case in cases]


def encoded_in(
    model: str, num_processes: int, captions_per_image: int, *, num_images: int = 160
) -> dict[str, float]:
    batch_size = 8
    with (
        checkpoint(model, small=True) as folder, tempfile.TemporaryDirectory() as name
    ):
        data = Path(name)
        write_rows(
            data, folder, model=model, num_images=num_images, captions_per_image=captions_per_image
        )
        ranks = in_processes(
            "benchmarks.processes:train_timed", num_processes,
            checkpoint=str(folder), data=str(data), cache_dir=str(data / "cache"),
            batch_size=batch_size, epochs=2, num_threads=1,
        )
    num_steps = num_images * captions_per_image // batch_size
    totals = np.array([one["num_encoded"] for one in ranks]).sum(axis=0)
    first, both = totals[num_steps - 1] - 1, totals[-1] - 1  # without the image of validation
    return {
        "num_processes": num_processes,
        "captions_per_image": captions_per_image,
        "first_epoch": first / num_images,
        "second_epoch": (both - first) / num_images,
    }


# --- the table ------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> str:
    def row(what: str, figures: Spread, goal: str, scale: float = 1.0) -> list[str]:
        numbers = (f"{scale * figures[key]:.3g}" for key in ("median", "min", "max"))
        return [what, *numbers, goal]

    rows = [[f"{result['model']}, batch {result['batch_size']}", "median", "min", "max", "goal"]]
    for name, figures in result["images_per_s"].items():
        rows.append(row(f"images/s, {name}", figures, ""))
    rows += [
        row("torchrun with one process / none", result["torchrun_against_none"], ">= 0.98"),
        row("two processes / two threads", result["two_against_one"], ">= 0.9"),
        row("the same, as many micro-batches", result["two_against_two_micro_batches"], ""),
        row("vote, ms a step", result["vote_s"], "<= 1", 1e3),
        row("exchange alone, ms", result["exchange_s"], "<= 25", 1e3),
        row("exchange in steps, with waiting, ms", result["exchange_in_steps_s"], "", 1e3),
        ["balance of 8 processes, dealt", f"{result['balance']['dealt']:.3f}", "", "", ">= 0.97"],
        ["the same, sorted batches", f"{result['balance']['sorted']:.3f}", "", "", ""],
    ]
    for case in result["encoded"]:
        goal = "1.00" if case["captions_per_image"] == 1 else "<= 1.02"
        what = (
            f"encoded / images, {case['num_processes']} processes, {case['captions_per_image']} "
            f"captions each"
        )
        rows.append([what, f"{case['first_epoch']:.2f}", "", "", goal])
        rows.append(["    second epoch", f"{case['second_epoch']:.2f}", "", "", "0"])
    return table(rows)


if __name__ == "__main__":
    main()
