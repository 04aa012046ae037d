"""A simulation of processes that work and wait, event after event.

A process is a generator. It yields (Resource, amount of work) to have work done, or a Signal to
wait for.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

Process = Generator[Any, None, None]

_ROUNDING = 1e-12


class Resource:
    """Work that jobs share equally; `speed` of the number of jobs is that of each of them.

    `done` is the work that a job would have done that has been there from the beginning.
    """

    def __init__(self, speed: Callable[[int], float]) -> None:
        self.speed = speed
        self.jobs: list[tuple[float, int, Process]] = []
        self.done = 0.0
        self.worked = 0.0  # of all jobs

    def next_end_s(self) -> float:
        if not self.jobs:
            return float("inf")
        return max(self.jobs[0][0] - self.done, 0.0) / self.speed(len(self.jobs))

    def advance(self, seconds: float) -> Iterator[Process]:
        if not self.jobs:
            return
        more = seconds * self.speed(len(self.jobs))
        self.done += more
        self.worked += more * len(self.jobs)
        end = self.done * (1 + _ROUNDING) + _ROUNDING
        while self.jobs and self.jobs[0][0] <= end:
            yield heapq.heappop(self.jobs)[2]


class Signal:
    """Processes that wait until something has changed."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.waiting: list[Process] = []

    def fire(self) -> None:
        self.world.ready.extend(self.waiting)
        self.waiting.clear()


class World:
    """Runs processes until `is_over`; `now_s` is the simulated time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ready: deque[Process] = deque()
        self.resources: list[Resource] = []
        self.num_jobs = 0
        self.is_over = False

    def resource(self, speed: Callable[[int], float]) -> Resource:
        self.resources.append(Resource(speed))
        return self.resources[-1]

    def run(self) -> None:
        while not self.is_over:
            while self.ready and not self.is_over:
                self._resume(self.ready.popleft())
            seconds = min(resource.next_end_s() for resource in self.resources)
            self.now_s += seconds
            for resource in self.resources:
                self.ready.extend(resource.advance(seconds))

    def _resume(self, process: Process) -> None:
        wanted = next(process, None)
        if isinstance(wanted, Signal):
            wanted.waiting.append(process)
        elif wanted is not None:
            resource, work = wanted
            self.num_jobs += 1
            heapq.heappush(resource.jobs, (resource.done + work, self.num_jobs, process))


class Loaded:
    """Micro-batches that `num` loaders prepare, at most `ahead` of them before they are used."""

    def __init__(self, world: World, load: Callable[[], Process], num: int, ahead: int) -> None:
        self.load, self.ahead = load, ahead
        self.num_begun = self.num_done = self.num_taken = 0
        self.changed = Signal(world)
        if ahead:
            world.ready.extend(self._loader() for _ in range(num))

    def _loader(self) -> Process:
        while True:
            while self.num_begun - self.num_taken >= self.ahead:
                yield self.changed
            self.num_begun += 1
            yield from self.load()
            self.num_done += 1
            self.changed.fire()

    def take(self) -> Process:
        if not self.ahead:
            yield from self.load()
            return
        while self.num_done <= self.num_taken:
            yield self.changed
        self.num_taken += 1
        self.changed.fire()
