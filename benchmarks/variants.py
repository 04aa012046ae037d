"""Training speed of LoRA's variants in later epochs, against the same variant in PEFT.

    python -m benchmarks.variants --model blip --batch_size 8 --rounds 5

The peer is B3 of peers.py, which keeps features, too. DoRA and LoRA-FA have steps of their own.
rsLoRA, PiSSA, OLoRA, EVA and the other initializations have LoRA's step with other numbers, and
LoRA+ has two groups in its optimizer: their time is LoRA's.
"""

from collections.abc import Callable

from benchmarks import plots
from benchmarks.contenders import checkpoint, make_case
from benchmarks.measure import cells, finish, flags, interleave, ratios, read_flags, spread, table

VARIANTS: dict[str, dict[str, bool]] = {
    "LoRA": {}, "DoRA": {"use_dora": True}, "LoRA-FA": {"use_lorafa": True},
}
STEPS = {"cpu": 4, "cuda": 64}  # a round


def main(argv: list[str] | None = None) -> None:
    arguments = read_flags(flags(__doc__), argv)
    num_steps = 2 if arguments.quick else STEPS[arguments.device.type]
    with checkpoint(arguments.model, small=arguments.quick) as folder:
        case = make_case(folder, arguments, num_rows=num_steps * arguments.batch_size)
        epochs: dict[str, Callable[[int], float]] = {}
        for name, variant in VARIANTS.items():
            epochs[f"ours, {name}"] = case.ours(variant=variant).later_epoch
            epochs[f"PEFT, {name}"] = case.peer("B3", variant=variant)
        figures = interleave(epochs, num_rounds=arguments.rounds, num_warm_ups=1)
    speeds = {name: spread(values) for name, values in figures.items()}
    over = {
        f"{name}, ours / PEFT": ratios(figures[f"ours, {name}"], figures[f"PEFT, {name}"])
        for name in VARIANTS
    } | {
        f"time of {name} / LoRA, ours": ratios(figures["ours, LoRA"], figures[f"ours, {name}"])
        for name in list(VARIANTS)[1:]
    }
    rows = [["captions/s", "median", "min", "max"]]
    rows += [cells(name, values) for name, values in (speeds | over).items()]
    finish(
        "variants", arguments, {"steps_a_round": num_steps, "captions_per_s": speeds, "over": over},
        text=table(rows),
        headline=", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in over.items()),
        draw=lambda axes: plots.bars(axes, speeds, "captions/s, later epoch"),
    )


if __name__ == "__main__":
    main()
