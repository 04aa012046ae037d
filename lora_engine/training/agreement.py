"""The steps of a run, each begun once all processes agree to take it.

Before a step every process votes: how many targets it has loaded, whether it wants to stop, whether
loading has failed. With several processes the vote on a step is sent before the step ahead of it is
computed, so that nobody waits for it; all of them stop after the same step.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, NoReturn

from lora_engine.data.batches import FeatureBatch, Skipped, StepRows
from lora_engine.ranks import Ranks, share
from lora_engine.stopping import Interrupted, StopSignal, TrainingStopped
from lora_engine.terminal import one_line
from lora_engine.training.micro_batches import BatchSplitter


class TrainingStep(NamedTuple):
    """A step that all processes take.

    `batches` are this process' micro-batches, from number `first` on. `num_targets`, `rows` (one
    list per micro-batch that is not empty) and `skipped` are those of all processes. `is_save_due`
    is whether a checkpoint is due after it by rank 0's clock, if there are several processes.
    """

    number: int
    batches: list[FeatureBatch]
    first: int
    num_targets: int
    rows: list[list[int]]
    skipped: list[Skipped]
    is_save_due: bool


class _Ballot(NamedTuple):
    """What a process says about a step; `max_rows` is the limit of `BatchSplitter`, or 0."""

    num_targets: int = 0
    num_skipped: int = 0
    max_rows: int = 0
    signal: int = 0
    has_failed: int = 0
    is_save_due: int = 0


class _Vote(NamedTuple):
    """A vote under way; `error` is why this process could not load the step."""

    number: int
    plan: StepRows
    batches: list[FeatureBatch]
    error: BaseException | None
    result: Callable[[], list[list[int]]]


def agreed_steps(
    plans: Iterable[StepRows],
    batches: Iterator[FeatureBatch],
    *,
    first_step: int,
    ranks: Ranks,
    stop: StopSignal,
    splitter: BatchSplitter,
    is_save_due: Callable[[int], bool],
) -> Iterator[TrainingStep]:
    """The steps of `plans`, numbered from `first_step`, with this process' `batches`.

    Raises Interrupted where a process has received a signal, and the error of one whose loading has
    failed: in all processes before the same step.
    """
    ahead: TrainingStep | None = None  # agreed on, and not yet taken
    for number, plan in enumerate(plans, first_step):
        vote = _vote(number, plan, batches, ranks, stop, splitter, is_save_due)
        if ahead is not None:
            yield ahead
        ahead = _agreed(vote, ranks, splitter)
        if ranks.size == 1:  # nobody to wait for: load when it is needed
            yield ahead
            ahead = None
    if ahead is not None:
        yield ahead


def _vote(
    number: int,
    plan: StepRows,
    batches: Iterator[FeatureBatch],
    ranks: Ranks,
    stop: StopSignal,
    splitter: BatchSplitter,
    is_save_due: Callable[[int], bool],
) -> _Vote:
    mine, error = _load(plan, batches, ranks, stop)
    ballot = _Ballot(
        num_targets=sum(batch.num_targets for batch in mine),
        num_skipped=sum(len(batch.skipped) for batch in mine),
        max_rows=splitter.num_rows or 0,
        signal=error.number if isinstance(error, Interrupted) else 0,
        has_failed=error is not None,
        is_save_due=ranks.size > 1 and ranks.is_main and is_save_due(number),
    )
    return _Vote(number, plan, mine, error, ranks.vote(ballot))


def _load(
    plan: StepRows, batches: Iterator[FeatureBatch], ranks: Ranks, stop: StopSignal
) -> tuple[list[FeatureBatch], BaseException | None]:
    """This process' micro-batches of a step, or why there are none."""
    mine = share(len(plan.micro_batches), ranks)
    num_batches = sum(1 for number in mine if plan.micro_batches[number])
    try:
        stop.check()
        return list(islice(batches, num_batches)), None
    except (Exception, Interrupted) as error:
        return [], error


def _agreed(vote: _Vote, ranks: Ranks, splitter: BatchSplitter) -> TrainingStep:
    ballots = [_Ballot(*values) for values in vote.result()]
    if any(ballot.has_failed for ballot in ballots):
        _raise(vote, ballots, ranks)
    # This process may have lowered its own after it voted.
    limits = [*(ballot.max_rows for ballot in ballots), splitter.num_rows or 0]
    splitter.num_rows = min(filter(None, limits), default=None)
    rows = [[index.row for index in batch] for batch in vote.plan.micro_batches if batch]
    skipped: list[Skipped] = []
    if any(ballot.num_skipped for ballot in ballots):
        mine = [[batch.rows, batch.skipped] for batch in vote.batches]
        loaded = [batch for part in ranks.gather(mine) for batch in part]
        rows = [batch_rows for batch_rows, _ in loaded]
        skipped = [Skipped(*problem) for _, problems in loaded for problem in problems]
    return TrainingStep(
        vote.number,
        vote.batches,
        share(len(vote.plan.micro_batches), ranks).start,
        sum(ballot.num_targets for ballot in ballots),
        rows,
        skipped,
        any(ballot.is_save_due for ballot in ballots),
    )


def _raise(vote: _Vote, ballots: list[_Ballot], ranks: Ranks) -> NoReturn:
    """Raise why a process cannot take the step, in all of them."""
    signals = [ballot.signal for ballot in ballots if ballot.signal]
    if signals:
        raise vote.error if isinstance(vote.error, Interrupted) else Interrupted(signals[0])
    reasons = ranks.gather(None if vote.error is None else one_line(vote.error))
    if vote.error is not None:
        raise vote.error
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
    raise TrainingStopped(f"{ranks.name(rank)}: {reason}")
