"""Processes agree on each step before any of them begins it."""

import signal
from types import SimpleNamespace

import pytest

from lora_engine.data.batches import SampleIndex, Skipped, StepRows
from lora_engine.ranks import OneProcess
from lora_engine.stopping import Interrupted, LoadingStopped, StopSignal, TrainingStopped
from lora_engine.training.agreement import _Ballot, agreed_steps
from lora_engine.training.micro_batches import BatchSplitter


class OneOfTwo(OneProcess):
    """Rank 0 of two; `other` has the ballots of rank 1, by step, and `gathered` what it gathers."""

    size = 2

    def __init__(self, other=(), gathered=None):
        super().__init__()
        self.other = [*other]
        self.gathered = gathered
        self.sent = []

    def vote(self, values):
        self.sent.append(_Ballot(*values))
        ballot = self.other.pop(0) if self.other else _Ballot(num_targets=5)
        return lambda: [list(values), list(ballot)]

    def gather(self, value):
        return [value, self.gathered]

    def name(self, rank):
        return f"rank {rank} (on there)"


def plan(*rows: int) -> StepRows:
    """A step of one row per micro-batch."""
    return StepRows([[SampleIndex(0, row, row)] for row in rows])


def batch(row: int, skipped=()):
    return SimpleNamespace(num_targets=row, rows=[row], skipped=[*skipped])


def steps_of(ranks, batches, *, stop=None, splitter=None, is_save_due=lambda step: False):
    return agreed_steps(
        [plan(10, 11), plan(12, 13), plan(14, 15)], iter(batches), first_step=7, ranks=ranks,
        stop=stop or StopSignal(), splitter=splitter or BatchSplitter(), is_save_due=is_save_due,
    )


def test_a_step_knows_what_all_processes_have_loaded():
    steps = [*steps_of(OneOfTwo(), [batch(10), batch(12), batch(14)], is_save_due=(9).__eq__)]
    assert [step.number for step in steps] == [7, 8, 9]
    assert [[b.rows for b in step.batches] for step in steps] == [[[10]], [[12]], [[14]]]
    assert [step.num_targets for step in steps] == [15, 17, 19]
    assert [step.rows for step in steps] == [[[10], [11]], [[12], [13]], [[14], [15]]]
    assert [step.is_save_due for step in steps] == [False, False, True]


def test_votes_are_sent_a_step_ahead_with_several_processes_only():
    ranks = OneOfTwo()
    steps = steps_of(ranks, [batch(10), batch(12), batch(14)])
    next(steps)
    assert len(ranks.sent) == 2
    loaded = []
    alone = OneProcess()
    both = [plan(1), plan(2)]
    steps = agreed_steps(
        both, (loaded.append(row) or batch(row) for row in (1, 2)), first_step=1, ranks=alone,
        stop=StopSignal(), splitter=BatchSplitter(), is_save_due=lambda step: False,
    )
    next(steps)
    assert loaded == [1]


def test_a_signal_to_any_process_stops_all_before_the_same_step():
    ranks = OneOfTwo([_Ballot(1), _Ballot(0, signal=signal.SIGTERM, has_failed=1)])
    steps = steps_of(ranks, [batch(10), batch(12), batch(14)])
    assert next(steps).number == 7
    with pytest.raises(Interrupted) as caught:
        next(steps)
    assert caught.value.number == signal.SIGTERM
    stop = StopSignal()
    stop.number = signal.SIGHUP
    ranks = OneOfTwo()
    with pytest.raises(Interrupted):
        next(steps_of(ranks, [batch(10)], stop=stop))
    assert ranks.sent == [_Ballot(signal=signal.SIGHUP, has_failed=1)]


def test_loading_that_has_failed_stops_all_before_the_same_step():
    ranks = OneOfTwo([_Ballot(1), _Ballot(has_failed=1)], gathered="no such folder")
    steps = steps_of(ranks, [batch(10), batch(12), batch(14)])
    assert next(steps).number == 7
    with pytest.raises(TrainingStopped, match=r"rank 1 \(on there\): no such folder"):
        next(steps)

    def fails():
        yield batch(10)
        raise LoadingStopped("mine")

    steps = steps_of(OneOfTwo(), fails())
    assert next(steps).number == 7  # which all have agreed to take
    with pytest.raises(LoadingStopped, match="mine"):
        next(steps)


def test_skipped_rows_of_all_processes_are_known():
    problem = Skipped(11, "11.png", "damaged")
    ranks = OneOfTwo([_Ballot(5, num_skipped=1)], gathered=[[[99], [list(problem)]]])
    step = next(steps_of(ranks, [batch(10), batch(12)]))
    assert step.rows == [[10], [99]] and step.skipped == [problem]


def test_the_smallest_limit_on_rows_holds_for_all_and_is_never_raised():
    splitter = BatchSplitter()
    ranks = OneOfTwo([_Ballot(5), _Ballot(5), _Ballot(5, max_rows=4)])
    steps = steps_of(ranks, [batch(10), batch(12), batch(14)], splitter=splitter)
    next(steps)
    splitter.num_rows = 8  # memory has run out in this step, after the vote on the next
    next(steps)
    assert splitter.num_rows == 8
    next(steps)
    assert splitter.num_rows == 4
