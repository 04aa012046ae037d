"""Successive halving: many settings for a few steps, the best third of them for three times as
many, and so on.

Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization,
https://arxiv.org/abs/1502.07943. Every run is a whole one, with its own warm-up and decay, so that
full runs have the length that was asked for, and their adapters are final. There are two: the
settings as they are, which come first, and the best of the others, which comes last. Features are
kept from run to run, so that nothing frozen is computed again.

Which runs there will be is decided once, by the time that the first two have taken, and stored in
tune.json, as are the results. All else is a function of settings and data: a search that is killed
and continued finds the same. Continued with other candidates, it keeps what it has found.
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
_PLAIN = {name: getattr(TrainingConfig, name) for kind in VARIANTS.values() for name in kind}
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
        """That of the settings as they are.

        Raises ValueError for a combination of variants.
        """
        given = {name: getattr(config, name) for name in _PLAIN}
        for variant, settings in VARIANTS.items():
            if given == _PLAIN | settings:
                return cls(config.lr, config.lora_rank, variant)
        flags = ", ".join(f"--{name}" for name, value in given.items() if value != _PLAIN[name])
        raise ValueError(f"tune compares single variants with --variants; leave out {flags}")

    def __str__(self) -> str:
        return f"{self.variant}-r{self.rank}-lr{self.lr:g}"

    def settings(self, config: TrainingConfig) -> dict[str, Any]:
        """The settings in which a run with this candidate differs from `config`; alpha / rank stays
        the same."""
        return {
            "lr": self.lr,
            "lora_rank": self.rank,
            "lora_alpha": config.lora_alpha / config.lora_rank * self.rank,
            **_PLAIN,
            **VARIANTS[self.variant],
        }


class Rung(NamedTuple):
    num_candidates: int
    num_steps: int


@dataclass(frozen=True)
class Result:
    """A finished run, by its best validation after a step was trained.

    `score` is that by --best_by, higher is better. `is_improvement` tells whether it is better than
    before training.
    """

    candidate: Candidate
    num_steps: int
    path: str
    score: float
    loss: float
    cider_d: float | None
    is_improvement: bool
    seconds: float

    @property
    def order(self) -> tuple[float, float]:
        """Sorts the best first; of equal scores the lower loss."""
        return -self.score, self.loss


def candidates_of(
    config: TrainingConfig, lrs: Sequence[float], ranks: Sequence[int], variants: Sequence[str]
) -> list[Candidate]:
    """The settings of `config`, then all other combinations in a random order that depends on the
    seed.

    Raises ValueError if there is none, and for settings that are not accepted.
    """
    own = Candidate.of(config)
    combinations = map(Candidate._make, product(lrs, ranks, variants))
    others = [candidate for candidate in dict.fromkeys(combinations) if candidate != own]
    if not others:
        raise ValueError("there is nothing to choose from: give two or more --lrs, --ranks or "
                         "--variants")
    for candidate in others:
        try:
            dataclasses.replace(config, **candidate.settings(config)).check()
        except ValueError as error:
            raise ValueError(f"{candidate}: {error}") from None
    random.Random(config.seed).shuffle(others)
    return [own, *others]


def rung_steps(total_steps: int) -> list[int]:
    """The steps of a run in each rung; the last one has all."""
    steps = [total_steps]
    while len(steps) < MAX_RUNGS and steps[0] >= FACTOR * MIN_STEPS:
        steps.insert(0, math.ceil(steps[0] / FACTOR))
    return steps


def rungs_of(num_candidates: int, total_steps: int) -> list[Rung]:
    """The rungs of a search; of several, the last one is one run."""
    *first, last = rung_steps(total_steps)
    rungs = [Rung(math.ceil(num_candidates / FACTOR**k), num) for k, num in enumerate(first)]
    rungs = rungs[:1] + [rung for rung in rungs[1:] if rung.num_candidates > 1]
    return [*rungs, Rung(1 if rungs else num_candidates, last)]


def plan_rungs(
    num_candidates: int, total_steps: int, *, short_s: float, full_s: float, budget_s: float
) -> list[Rung]:
    """The rungs with the most candidates that take at most `budget_s`; at least one candidate.

    A run of the first rung takes `short_s`, a full one `full_s`, others in between.
    """
    first_steps = rung_steps(total_steps)[0]

    def run_s(num_steps: int) -> float:
        share = (num_steps - first_steps) / max(1, total_steps - first_steps)
        return short_s + share * (full_s - short_s)

    for num in range(num_candidates, 0, -1):
        rungs = rungs_of(num, total_steps)
        if sum(n * run_s(num_steps) for n, num_steps in rungs) <= budget_s:
            return rungs
    logger.warning(
        f"--minutes is too short for more than one other candidate: a full run takes "
        f"{duration(full_s)}"
    )
    return rungs_of(1, total_steps)


def tune(
    config: TrainingConfig, candidates: Sequence[Candidate], *, minutes: float, folder: Path
) -> list[Result]:
    """Run the candidates, or what is left of a search in `folder` -> the results of all runs. The
    first candidate gets a full run, whatever the others do.

    Raises ValueError if `folder` holds a search with other settings, and as `train` does.
    """
    try:
        return _tune(config, candidates, minutes, folder)
    except (Interrupted, KeyboardInterrupt, TrainingStopped) as error:
        error.__notes__ = ["repeat the command with --resume to continue"]
        raise


def _tune(
    config: TrainingConfig, candidates: Sequence[Candidate], minutes: float, folder: Path
) -> list[Result]:
    total_steps = Schedule(config, len(read_rows(config).train)).total_steps
    search = _Search(config, folder, total_steps, _opened_search(config, candidates, folder))
    own, *left = candidates
    full = search.result(own, total_steps)
    if not search.stored["rungs"]:
        first_steps = rung_steps(total_steps)[0]
        # A run that has diverged was short.
        short_s = max(
            search.result(left[0], first_steps).seconds, full.seconds * first_steps / total_steps
        )
        search.stored["rungs"] = plan_rungs(
            len(left), total_steps, short_s=short_s, full_s=full.seconds,
            budget_s=60 * minutes - full.seconds,
        )
        search.write()
    rungs = [Rung(*rung) for rung in search.stored["rungs"]]
    logger.info("others: " + ", ".join(f"{n} of {steps} steps" for n, steps in rungs))
    for num_candidates, num_steps in rungs:
        results = [search.result(candidate, num_steps) for candidate in left[:num_candidates]]
        results.sort(key=lambda found: found.order)  # stable: of equal ones the earlier
        left = [found.candidate for found in results]
    return search.done


class _Search:
    """The runs of a search, and tune.json."""

    def __init__(
        self, config: TrainingConfig, folder: Path, total_steps: int, stored: dict[str, Any]
    ) -> None:
        self.config = config
        self.folder = folder
        self.total_steps = total_steps
        self.stored = stored
        self.done = [
            Result(**values | {"candidate": Candidate(*values["candidate"])})
            for values in stored["results"]
        ]

    def result(self, candidate: Candidate, num_steps: int) -> Result:
        """The result of a run, which is made if it is not known."""
        for found in self.done:
            if (found.candidate, found.num_steps) == (candidate, num_steps):
                return found
        settings = dataclasses.replace(
            self.config,
            **candidate.settings(self.config),
            output_path=str(self.folder / f"steps-{num_steps}" / str(candidate)),
            resume=NEWEST,
            max_steps=num_steps,
        )
        if num_steps < self.total_steps:
            warmup_steps = min(self.config.warmup_steps, num_steps // 10)
            settings = dataclasses.replace(
                settings, warmup_steps=warmup_steps, eval_every=num_steps, patience=None
            )
        self.done.append(_run(settings, candidate, num_steps))
        self.stored["results"] = list(map(dataclasses.asdict, self.done))
        self.write()
        return self.done[-1]

    def write(self) -> None:
        _write(self.folder, self.stored)


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
    ]
    if different:
        raise ValueError(
            f"the search in {folder} has another {', '.join(different)}; give the same flags, or "
            f"another --output_path"
        )
    if search["candidates"] != wanted["candidates"]:
        search |= wanted | {"rungs": []}
    return search


def _run(settings: TrainingConfig, candidate: Candidate, num_steps: int) -> Result:
    begin_s = time.monotonic()
    try:
        with _quiet():
            summary = train(settings)
    except Diverged:  # is an answer, too
        logger.info(f"{candidate!s:<24} {num_steps:>6} steps  diverged")
        return Result(
            candidate, num_steps, str(settings.output_path), score=-math.inf, loss=math.inf,
            cider_d=None, is_improvement=False, seconds=time.monotonic() - begin_s,
        )
    except ValueError as error:
        raise ValueError(f"{candidate}: {error}") from None

    def score(step: int) -> float:
        scores = summary.scores.get(step)
        if summary.best_by == "loss" or scores is None:
            return -summary.losses[step]
        return scores.cider_d

    trained = [step for step in summary.losses if step > 0]
    step = min(trained, key=lambda step: (-score(step), summary.losses[step]))
    scores = summary.scores.get(step)
    result = Result(
        candidate, num_steps, str(summary.path), score=score(step), loss=summary.losses[step],
        cider_d=None if scores is None else scores.cider_d,
        is_improvement=summary.best_step > 0, seconds=time.monotonic() - begin_s,
    )
    logger.info(
        f"{candidate!s:<24} {num_steps:>6} steps  loss {result.loss:.4f}"
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


def _write(folder: Path, search: dict[str, Any]) -> None:
    with replaced_file(folder / SEARCH_FILE) as new:
        new.write_text(json.dumps(search, indent=1) + "\n", encoding="utf-8")
