"""Successive halving: many settings for a few steps, the best third of them for three times as
many, and so on.

Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization,
https://arxiv.org/abs/1502.07943. Every run is a whole one, with its own warm-up and decay, so that
the last ones have the length that was asked for, and their adapters are final. They are two: the
settings as they are, and the best of the others. Features are kept from run to run, so that nothing
frozen is computed again.

Which runs there will be is decided once, by the time that the first two have taken, and stored in
tune.json, as are the results. All else is a function of settings and data: a search that is killed
and continued finds the same.
"""

import dataclasses
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lora_engine.config import NEWEST, TrainingConfig
from lora_engine.files import replaced_file
from lora_engine.report.metrics_log import duration
from lora_engine.report.run_record import read_records
from lora_engine.stopping import Diverged, Interrupted, TrainingStopped
from lora_engine.training.loop import train
from lora_engine.training.run_data import read_rows
from lora_engine.training.schedule import Schedule

logger = logging.getLogger(__name__)

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lorafa": {"use_lorafa": True},
    "loraplus": {"loraplus_lr_ratio": 8.0},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
}
FACTOR = 3
MIN_STEPS = 20  # in the first rung
MAX_RUNGS = 4
SEARCH_FILE = "tune.json"


class Candidate(NamedTuple):
    """Settings to try."""

    lr: float
    rank: int
    variant: str

    @classmethod
    def of(cls, config: TrainingConfig) -> "Candidate":
        """That of the settings as they are."""
        return cls(config.lr, config.lora_rank, "lora")

    def __str__(self) -> str:
        return f"{self.variant}-r{self.rank}-lr{self.lr:g}"

    def settings(self, config: TrainingConfig) -> dict[str, Any]:
        """The settings in which a run with this candidate differs from `config`; alpha / rank stays
        the same."""
        return {
            "lr": self.lr,
            "lora_rank": self.rank,
            "lora_alpha": config.lora_alpha / config.lora_rank * self.rank,
            **VARIANTS[self.variant],
        }


class Rung(NamedTuple):
    num_candidates: int
    num_steps: int


@dataclass(frozen=True)
class Result:
    """A finished run; `score` is the best by --best_by, higher is better."""

    rung: int
    candidate: Candidate
    path: str
    score: float
    loss: float
    cider_d: float | None
    seconds: float


def candidates_of(
    config: TrainingConfig, lrs: Sequence[float], ranks: Sequence[int], variants: Sequence[str]
) -> list[Candidate]:
    """All combinations in a random order that depends on the seed, the settings of `config` first,
    if they are among them.

    Raises ValueError if there are fewer than two.
    """
    found = list(dict.fromkeys(map(Candidate._make, product(lrs, ranks, variants))))
    if len(found) < 2:
        raise ValueError("there is nothing to choose from: give two or more --lrs, --ranks or "
                         "--variants")
    random.Random(config.seed).shuffle(found)
    return sorted(found, key=lambda candidate: candidate != Candidate.of(config))


def rung_steps(total_steps: int) -> list[int]:
    """The steps of a run in each rung; the last one has all."""
    steps = [total_steps]
    while len(steps) < MAX_RUNGS and steps[0] >= FACTOR * MIN_STEPS:
        steps.insert(0, math.ceil(steps[0] / FACTOR))
    return steps


def rungs_of(num_candidates: int, total_steps: int) -> list[Rung]:
    """The rungs of a search; of several, the last one is two runs."""
    *first, last = rung_steps(total_steps)
    rungs = [Rung(math.ceil(num_candidates / FACTOR**k), num) for k, num in enumerate(first)]
    rungs = rungs[:1] + [rung for rung in rungs[1:] if rung.num_candidates > 2]
    return [*rungs, Rung(2 if rungs else num_candidates, last)]


def plan_rungs(
    num_candidates: int,
    total_steps: int,
    *,
    run_s: float,
    step_s: float,
    budget_s: float,
    full_run_s: float = 0.0,
) -> list[Rung]:
    """The rungs with the most candidates that take at most `budget_s`; at least two candidates.

    A run takes `run_s` and `step_s` for each of its steps, a full one `full_run_s` more; two runs
    of the first rung are done.
    """
    for num in range(num_candidates, 1, -1):
        rungs = rungs_of(num, total_steps)
        total_s = sum(n * (run_s + steps * step_s) for n, steps in rungs)
        total_s += rungs[-1].num_candidates * full_run_s
        if total_s - 2 * (run_s + rungs[0].num_steps * step_s) <= budget_s:
            return rungs
    rungs = rungs_of(2, total_steps)
    logger.warning(
        f"--minutes is too short for a full run of {total_steps} steps after the first ones: it "
        f"takes about {duration(run_s + total_steps * step_s + full_run_s)}; continuing with two "
        f"candidates"
    )
    return rungs


def tune(
    config: TrainingConfig, candidates: Sequence[Candidate], *, minutes: float, folder: Path
) -> list[Result]:
    """Run the candidates, or what is left of a search in `folder` -> the results of all runs.

    Raises ValueError if `folder` holds another search, and as `train` does.
    """
    rows = read_rows(config)
    total_steps = Schedule(config, len(rows.train)).total_steps
    first_rung = rung_steps(total_steps)[0]
    search = _opened_search(config, candidates, folder)
    done = [
        Result(**values | {"candidate": Candidate(*values["candidate"])})
        for values in search["results"]
    ]

    def result(rung: int, candidate: Candidate, num_steps: int) -> Result:
        for found in done:
            if (found.rung, found.candidate) == (rung, candidate):
                return found
        settings = dataclasses.replace(
            config,
            **candidate.settings(config),
            output_path=str(folder / f"rung-{rung}" / str(candidate)),
            resume=NEWEST,
            max_steps=num_steps,
        )
        if num_steps < total_steps:
            warmup_steps = min(config.warmup_steps, num_steps // 10)
            settings = dataclasses.replace(
                settings, warmup_steps=warmup_steps, eval_every=num_steps, patience=None
            )
        done.append(_run(settings, candidate, rung, folder))
        search["results"] = list(map(dataclasses.asdict, done))
        _write(folder, search)
        return done[-1]

    if not search["rungs"]:
        first, second = (result(0, candidate, first_rung) for candidate in candidates[:2])
        step_s = _step_s(Path(second.path), config.rows_per_step) or second.seconds / first_rung
        # The first run has encoded the images of its steps; a longer one encodes more.
        steps_per_epoch = math.ceil(len(rows.train) / config.rows_per_step)
        encode_s = max(0.0, first.seconds - second.seconds) / min(first_rung, steps_per_epoch)
        to_encode = max(0, min(total_steps, steps_per_epoch) - first_rung)
        run_s = max(0.0, second.seconds - first_rung * step_s)
        # Most of it are the validations before and after; full runs have more of them.
        num_validations = total_steps // (config.eval_every or steps_per_epoch)
        rungs = plan_rungs(
            len(candidates), total_steps,
            run_s=run_s, step_s=step_s, full_run_s=run_s / 2 * max(0, num_validations - 1),
            budget_s=60 * minutes - first.seconds - second.seconds - encode_s * to_encode,
        )
        search["rungs"] = rungs
        _write(folder, search)
    rungs = [Rung(*rung) for rung in search["rungs"]]
    logger.info("runs: " + ", ".join(f"{n} of {steps} steps" for n, steps in rungs))
    own = Candidate.of(config)
    left = list(candidates)
    for number, (num_candidates, num_steps) in enumerate(rungs):
        if num_steps == total_steps:  # what is found must be better than the settings as they are
            left.sort(key=lambda candidate: candidate != own)
        results = [result(number, candidate, num_steps) for candidate in left[:num_candidates]]
        results.sort(key=lambda found: -found.score)  # stable: of equal scores the earlier one
        left[:num_candidates] = [found.candidate for found in results]
    return done


def _opened_search(
    config: TrainingConfig, candidates: Sequence[Candidate], folder: Path
) -> dict[str, Any]:
    """What tune.json holds of the search in `folder`, new or to be continued."""
    if config.push_to_hub is not None:
        raise ValueError("--push_to_hub: tune trains many adapters; upload the one you choose")
    settings = json.loads(json.dumps(config.as_dict() | {"output_path": None}))
    wanted = {"settings": settings, "candidates": [list(candidate) for candidate in candidates]}
    path = folder / SEARCH_FILE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} already holds files, but no search; give another --output_path"
            )
        folder.mkdir(parents=True, exist_ok=True)
        new = wanted | {"rungs": [], "results": []}
        _write(folder, new)
        return new
    if config.resume is None:
        raise ValueError(
            f"{folder} already holds a search; add --resume to continue it, or give another "
            f"--output_path"
        )
    search = json.loads(path.read_text(encoding="utf-8"))
    different = [
        name for name, value in settings.items() if search["settings"].get(name, value) != value
    ] + (["candidates"] if search["candidates"] != wanted["candidates"] else [])
    if different:
        raise ValueError(
            f"the search in {folder} has another {', '.join(different)}; give the same flags, or "
            f"another --output_path"
        )
    return search


def _run(settings: TrainingConfig, candidate: Candidate, rung: int, folder: Path) -> Result:
    begin_s = time.monotonic()
    try:
        with _quiet():
            summary = train(settings)
    except Diverged:  # is an answer, too
        logger.info(f"{candidate!s:<24} {settings.max_steps:>6} steps  diverged")
        seconds = time.monotonic() - begin_s
        worst = -math.inf, math.inf
        return Result(rung, candidate, str(settings.output_path), *worst, None, seconds)
    except (Interrupted, TrainingStopped) as error:
        error.__notes__ = [f"repeat the command with --output_path {folder} --resume to continue"]
        raise
    loss, scores = summary.losses[summary.best_step], summary.scores.get(summary.best_step)
    score = -loss if summary.best_by == "loss" or scores is None else scores.cider_d
    result = Result(
        rung, candidate, str(summary.path), score, loss, None if scores is None else scores.cider_d,
        time.monotonic() - begin_s,
    )
    logger.info(
        f"{candidate!s:<24} {settings.max_steps:>6} steps  loss {loss:.4f}"
        + ("" if result.cider_d is None else f"  CIDEr-D {result.cider_d:.4f}")
    )
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what a single run says about itself, except for warnings."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _step_s(run: Path, rows_per_step: int) -> float:
    """Seconds of a step, by the fastest of those that the run has logged; 0 if it logged none."""
    lines = read_records(run / "metrics.jsonl", event=str)
    rates = [line["images_per_s"] for line in lines if line["event"] == "train"]
    return rows_per_step / max(rates) if rates else 0.0


def _write(folder: Path, search: dict[str, Any]) -> None:
    with replaced_file(folder / SEARCH_FILE) as new:
        new.write_text(json.dumps(search, indent=1) + "\n", encoding="utf-8")
