"""A RunRecord -> the sentences, figures and settings that the report shows."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from lora_engine.captioning.metrics import SCORE_NAMES
from lora_engine.config import TrainingConfig
from lora_engine.report.metrics_log import duration
from lora_engine.report.run_record import RunRecord, is_number

NOTHING = "–"

# Keys of environment.json that describe the run, not versions and the machine.
ABOUT_THE_RUN = frozenset((
    "total_s", "peak_memory_bytes", "num_train_captions", "num_train_images",
    "num_val_captions", "num_val_images", "num_adapted_modules", "num_trainable", "num_frozen",
    "total_steps", "tokenizer_fingerprint", "stopped",
))

Better = Callable[[Iterable[float]], float] | None  # max, min, or neither

# Which values of a score are better; scores that are not listed are not ranked.
BETTER: dict[str, Better] = dict.fromkeys(SCORE_NAMES, max) | {
    "repetition": min, "mean_length": None,
}

# What the names of the loss and of scores do not tell.
MEANINGS = {
    "loss": "nats per token; lower is better",
    "cider_d": "agreement with the references in rare phrases, 0 to 10; 0 for a single image",
    "bleu_4": "phrases of up to four words that the references have too, 0 to 1",
    "rouge_l": "longest common subsequence with a reference, 0 to 1",
    "ended": "the other captions were cut off at the length limit",
    "distinct": "1 if no two images have the same caption",
    "repetition": "three words in a row that the caption has had before; lower is better",
}


class Result(NamedTuple):
    """A figure as text, with a remark and, if runs can be ranked by it, its value."""

    text: str
    remark: str = ""
    value: float | None = None
    better: Better = None


def score_name(key: str) -> str:
    return SCORE_NAMES.get(key, key)


def score_keys(runs: Sequence[RunRecord]) -> list[str]:
    """The scores that any of the runs has: in the order of SCORE_NAMES, then all others."""
    found = dict.fromkeys(key for run in runs for key in run.scores)
    return [key for key in SCORE_NAMES if key in found] + [
        key for key in found if key not in SCORE_NAMES
    ]


def score_at(run: RunRecord, key: str, step: int) -> float | None:
    """A score of the validation at `step`; None without one."""
    return dict(zip(*run.validation(key))).get(step)


def names(runs: Sequence[RunRecord]) -> list[str]:
    """The folders' names, or their paths if two names are equal."""
    own = [run.path.resolve().name for run in runs]
    return own if len(set(own)) == len(own) else [str(run.path) for run in runs]


def model_name(config: dict[str, Any]) -> str:
    """The last part of the model's Hub name or folder."""
    return Path(text(config.get("model"))).name


def subtitle(run: RunRecord) -> str:
    model = text(run.config.get("model"))
    return f"LoRA on {model_name(run.config) if Path(model).is_absolute() else model}"


def status(run: RunRecord) -> str:
    """Whether the run is running, has finished, or has stopped, and at which step."""
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    step = f"step {run.last_step:,}{total}" if run.last_step else "the start of training"
    if run.is_running:
        return f"Running, step {run.last_step:,}{total}."
    if not run.is_finished:
        reason = text(run.environment.get("stopped"))
        if reason == NOTHING:
            return f"This run is not finished: its record ends at {step}."
        return f"This run is not finished: it stopped at {step} ({reason})."
    patience = run.config.get("patience")
    if run.last_step < (run.total_steps or 0) and patience:
        validations = counted(patience, "validation")
        return f"Stopped early, at {step}: no better for {validations} (--patience)."
    return f"Finished after {counted(run.last_step, 'step')}."


def headline(run: RunRecord) -> str:
    """The outcome in a sentence or two."""
    losses = run.validation("loss")
    if not losses.steps:
        return "No validation is recorded."
    step = run.best_step
    best = score_at(run, "loss", step)
    first_step, last_step = losses.steps[0], losses.steps[-1]
    if len(losses.steps) == 1:
        when = f"step {step:,}" if step else "before training"
        return f"The validation loss {when} is {figure(best)} nats per token."
    criterion = str(run.config.get("best_by", "loss"))
    # If all are 0, as those of one image are by definition, the lower loss has decided.
    is_by_score = criterion != "loss" and any(run.validation(criterion).values)
    name = score_name(criterion) if is_by_score else "validation loss"
    if step == first_step:
        never = "has not yet" if run.is_running else "never"
        return (
            f"The {name} {never} improved on its value before training, so adapter/ holds the "
            f"initial adapter. The validation loss was {figure(best)} nats per token then and is "
            f"{figure(losses.values[-1])} at step {last_step:,}."
        )
    sentence = (
        f"The adapter of step {step:,} of {_total(run)} is the best "
        f"{'so far ' if run.is_running else ''}by {name}: the validation loss went "
        f"from {figure(losses.values[0])} to {figure(best)} nats per token"
    )
    for key in score_keys([run])[:1]:
        before, after = (score_at(run, key, at) for at in (first_step, step))
        if before is not None and after is not None:
            change = f"from {figure(before)} to {figure(after)}"
            if after == before:
                change = f"at {figure(after)}"
            verb = "rose" if after > before else "fell" if after < before else "stayed"
            sentence += f"; {score_name(key)} {verb} {change}"
    return sentence + "."


def scored(run: RunRecord) -> str:
    """What the scores were measured on, and how."""
    known = [line for line in run.validations if {"num_images", "num_references"} <= line.keys()]
    if not known:
        return ""
    return (
        f"Greedy captions of {counted(known[-1]['num_images'], 'validation image')} with "
        f"{counted(known[-1]['num_references'], 'reference')}, scored as by COCO's caption "
        f"evaluation."
    )


def notices(run: RunRecord) -> list[str]:
    """Notes that the reader needs to interpret the rest."""
    found = []
    for name, content in (("config.json", run.config), ("environment.json", run.environment)):
        if not content:
            found.append(f"The run folder has no {name}, so its information is missing here.")
    skipped = Counter(
        bool(line.get("by_grad_scaler")) for line in run.metrics
        if line["event"] == "skipped_step"
    )
    if skipped[False]:
        number = f"{skipped[False]:,}"
        found.append(f"Steps skipped because loss or gradients were not finite: {number}.")
    if skipped[True]:
        found.append(f"Steps skipped to adjust the loss scale of fp16: {skipped[True]:,}.")
    return found


def has_same_tokens(runs: Sequence[RunRecord]) -> bool:
    """Whether the losses of the runs, per token, can be compared: their tokenizers are the same."""
    tokenizers = {run.environment.get("tokenizer_fingerprint") for run in runs}
    if None in tokenizers:  # a run of an earlier version
        return len({text(run.config.get("model")) for run in runs}) == 1
    return len(tokenizers) == 1


def outcome(run: RunRecord, *, ranks_loss: bool) -> dict[str, Result]:
    """The validation loss and the scores of the best step, by label."""
    losses = run.validation("loss")
    if not losses.steps:
        return {}
    step = run.best_step
    best = score_at(run, "loss", step)
    remark = f"{figure(losses.values[0])} before; step {step:,} of {_total(run)}"
    found = {"Validation loss": Result(figure(best), remark, best, min if ranks_loss else None)}
    for key in score_keys([run]):
        before, after = (score_at(run, key, at) for at in (losses.steps[0], step))
        found[score_name(key)] = Result(
            figure(after), f"{figure(before)} before", after, BETTER.get(key)
        )
    return found


def costs(run: RunRecord) -> dict[str, Result]:
    """What the run took, and how much it trains, by label."""
    found = {}
    speeds, waits = (run.training(key).values for key in ("images_per_s", "data_wait_share"))
    if speeds:
        remark = f"median; {fmean(waits):.0%} of the time waiting for data" if waits else "median"
        found["Images per second"] = Result(figure(median(speeds)), remark, median(speeds), max)
    environment = run.environment
    seconds, memory = environment.get("total_s"), environment.get("peak_memory_bytes")
    if is_number(seconds):
        found["Time"] = Result(duration(seconds), "including loading and validation", seconds, min)
    if is_number(memory):
        on_gpu = text(environment.get("device")).startswith("cuda")
        remark = "peak on the GPU" if on_gpu else "peak of the process"
        found["Memory"] = Result(_bytes(memory), remark, memory, min)
    trainable, frozen = environment.get("num_trainable"), environment.get("num_frozen")
    if is_number(trainable) and is_number(frozen):
        share = 100.0 * trainable / max(trainable + frozen, 1)
        found["Trainable parameters"] = Result(
            count(trainable), f"{share:.2f} % of all; {count(frozen)} frozen"
        )
    if run.skipped:
        found["Skipped images and rows"] = Result(count(len(run.skipped)), "could not be used")
    return found


def main_settings(run: RunRecord) -> dict[str, str]:
    """The most important settings: what was trained, on which data, and how."""
    config, environment = run.config, run.environment

    def given(key: str) -> str:
        return text(config.get(key))

    def data(path: str, part: str) -> str:
        captions = environment.get(f"num_{part}_captions")
        images = environment.get(f"num_{part}_images")
        source = given(path) if config.get(path) else "held out from the training data"
        if captions is None:
            return source
        return f"{counted(captions, 'caption')} of {counted(images, 'image')}: {source}"

    found: dict[str, str] = {}
    if config:
        num_modules = environment.get("num_adapted_modules")
        modules = "" if num_modules is None else f", {counted(num_modules, 'module')}"
        warmup = f"{given('warmup_steps')} warmup steps"
        if config.get("warmup_ratio") is not None:
            warmup = f"warmup ratio {given('warmup_ratio')}"
        schedule = text(config.get("lr_schedule", "linear"))
        found |= {
            "Model": given("model"),
            "Training data": data("train_data_path", "train"),
            "Validation data": data("val_data_path", "val"),
            "Adapted layers": f"{given('lora_targets')}{modules}",
            "Rank": f"{given('lora_rank')}, alpha {given('lora_alpha')}, dropout "
            f"{given('lora_dropout')}{''.join(f', {name}' for name in variants(config))}",
            "Epochs": given("epochs"),
            "Batch size": f"{given('batch_size')}, gradient accumulation steps: "
            f"{given('grad_accum_steps')}",
            "Learning rate": f"{given('lr')}, {warmup}, {schedule}",
            "Seed": given("seed"),
        }
        optional = {
            "Revision": "revision", "Initial adapter": "init_adapter", "Prompt": "prompt",
            "Maximum steps": "max_steps",
        }
        found |= {label: given(key) for label, key in optional.items() if config.get(key)}
    if environment:
        found["Compute dtype"] = text(environment.get("compute_dtype"))
        found["Device"] = text(environment.get("device"))
    return found


def settings(run: RunRecord) -> dict[str, str]:
    """All settings except the run folder's path."""
    return {key: text(value) for key, value in run.config.items() if key != "output_path"}


def default_settings() -> dict[str, str]:
    """The defaults of TrainingConfig; a run does not record those of its recipe."""
    fields = [
        field for field in dataclasses.fields(TrainingConfig)
        if field.default is not dataclasses.MISSING
    ]
    return {field.name: text(field.default) for field in fields}


def versions_and_machine(run: RunRecord) -> dict[str, str]:
    return {
        key: text(value) for key, value in run.environment.items() if key not in ABOUT_THE_RUN
    }


def figure(value: float | None) -> str:
    """Four significant digits; 0.000 for what is less than 0.0001."""
    if value is None:
        return NOTHING
    if abs(value) < 1e-4:
        return "0.000"
    rounded = float(f"{value:.4g}")
    if 1000 <= abs(rounded) < 1e9:
        return f"{rounded:,.0f}"
    return f"{rounded:#.4g}".replace("e+0", "e+")


def count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else text(value)


def counted(value: Any, noun: str) -> str:
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def text(value: Any) -> str:
    """A JSON value for people to read."""
    if value is None or value == "":
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _total(run: RunRecord) -> str:
    return count(run.total_steps or run.last_step)


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def variants(config: Mapping[str, Any]) -> list[str]:
    """What a run's settings say about its variant of LoRA, beyond rank, alpha and dropout."""
    given = {key: config.get(key) for key in (
        "rank_pattern", "alpha_pattern", "lora_layers", "loraplus_lr_ratio"
    )}
    how = config.get("init_lora_weights") or "default"
    how = "default" if config.get("init_adapter") else how
    names = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "use_lorafa": "LoRA-FA"}
    return [
        *(name for key, name in names.items() if config.get(key)),
        *([f"initialization {how}"] if how != "default" else []),
        *(
            f"{key} {' '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
            for key, value in given.items() if value
        ),
    ]
