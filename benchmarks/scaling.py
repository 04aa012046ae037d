"""A simulation of a run on many GPUs or machines: images/s, efficiency, and what limits it.

    python -m benchmarks.scaling                       the plans of docs/scaling.md
    python -m benchmarks.scaling --num_machines 4 --num_processes 8 --batch_size 128
    python -m benchmarks.scaling --validate            against real runs, on this CPU

Every process loads micro-batches (disk, processors), encodes images whose features are not kept,
computes its share of a step, waits for all others, and exchanges gradients. The processes of a
machine share its disk and processors in equal parts. All times are inputs (`Setup`); those of GPUs
are assumptions, because no GPU has run this engine yet.

Efficiency is images/s divided by those of as many single processes, each with a machine of its own.
"""

import argparse
import dataclasses
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.events import Loaded, Process, Resource, Signal, World
from benchmarks.measure import table

NUM_WARM_UPS, NUM_STEPS = 10, 40  # simulated
PIECE = 8  # images that a loader reads and decodes together


@dataclass(frozen=True)
class Setup:
    """A run. Times are in seconds, of one image, caption, micro-batch or step; alone on its core.

    `kept_share` of the images have kept features after the first epoch, `memory_share` of all in
    memory, the rest on disk. `images_ahead` and `features_ahead` micro-batches are loaded ahead by
    each process; 0: when they are needed. With `on_cores` the processors compute, too, one per
    process. `busy_speed` is the speed of a processor when all are busy. `variation` is the relative
    standard deviation of a process' time for a step.
    """

    num_machines: int = 1
    num_processes: int = 1  # on each machine: one per GPU
    micro_batches: int = 1  # of each process in a step
    batch_size: int = 32  # captions of a micro-batch
    captions_per_image: float = 1.0

    disk_bytes_per_s: float = 6e9
    image_bytes: float = 60e3
    feature_bytes: float = 886e3
    kept_share: float = 1.0
    memory_share: float = 0.0

    num_cores: int = 96
    num_loaders: int = 12  # processes of each process, which read images
    images_ahead: int = 24
    num_readers: int = 4  # threads of each process, which read features
    features_ahead: int = 4
    decode_s: float = 1 / 243  # 640 x 480, measured (benchmarks/LOG.md)
    feature_s: float = 0.15e-3  # to verify and copy features
    busy_speed: float = 1.0

    on_cores: bool = False
    encode_s: float = 0.28e-3  # an H100's 989 TFLOP/s in bf16: 111 GFLOP at 40 % of them
    caption_s: float = 70e-6  # 14 GFLOP at 25 % of them, and 43 MB of attention weights
    micro_batch_s: float = 2.5e-3  # 1,500 kernels, in a CUDA graph
    update_s: float = 0.3e-3
    variation: float = 0.02

    gradient_bytes: float = 4 * (239_616 * 8 + 1)
    link_bytes_per_s: float = 200e9  # of a process within its machine
    link_latency_s: float = 20e-6
    network_bytes_per_s: float = 12.5e9  # of a machine: 100 Gbit/s
    network_latency_s: float = 50e-6

    @property
    def size(self) -> int:
        return self.num_machines * self.num_processes

    @property
    def exchange_s(self) -> float:
        """All-to-all of the parts, then a ring that gathers the sums, on the slower link."""
        if self.size == 1:
            return 0.0
        slice_bytes = self.gradient_bytes / self.size
        ring_bytes = (self.size - 1) * slice_bytes
        near, far = self.num_processes - 1, self.size - self.num_processes
        link_s = (self.micro_batches * near * slice_bytes + ring_bytes) / self.link_bytes_per_s
        if not far:
            return link_s + 2 * self.link_latency_s
        network_bytes = self.num_processes * self.micro_batches * far * slice_bytes + ring_bytes
        return max(link_s, network_bytes / self.network_bytes_per_s) + 2 * self.network_latency_s

    def core_speed(self, num_jobs: int) -> float:
        """The speed of each of some jobs on a machine's processors; 1: that of one alone."""
        num_busy = min(num_jobs, self.num_cores)
        slower = (1 - self.busy_speed) * (num_busy - 1) / max(self.num_cores - 1, 1)
        return (1 - slower) * num_busy / num_jobs


@dataclass(frozen=True)
class Outcome:
    """`busy`: the share of the time in which each kind of resource worked; 1: it is the limit."""

    images_per_s: float
    busy: dict[str, float]

    @property
    def limits(self) -> str:
        """The busiest resource, and others that are nearly as busy."""
        found = sorted(self.busy.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {busy:.0%}" for name, busy in found if busy > found[0][1] / 2)


# --- the run --------------------------------------------------------------------------------------


def load_images(
    setup: Setup, share: float, disk: Resource, cores: Resource, generator: random.Random
) -> Process:
    """Read and decode the images of this share of a micro-batch."""
    num_pieces = -(-setup.batch_size // PIECE)
    num_images = setup.batch_size * share / num_pieces
    for _ in range(num_pieces):
        yield disk, num_images * setup.image_bytes
        yield cores, num_images * setup.decode_s * generator.uniform(0.5, 1.5)


def load_features(setup: Setup, share: float, disk: Resource, cores: Resource) -> Process:
    yield disk, setup.batch_size * share * setup.feature_bytes
    yield cores, setup.batch_size * share * setup.feature_s


def simulate(setup: Setup, *, is_first: bool) -> Outcome:
    """A first epoch, in which every image is encoded once, or a later one."""
    world = World()
    generator = random.Random(0)
    fresh = 1 / setup.captions_per_image if is_first else 1 - setup.kept_share
    from_disk = 0.0 if is_first else max(setup.kept_share - setup.memory_share, 0.0)
    arrived = Signal(world)
    num_arrived, marks = 0, []
    network = world.resource(lambda num: 1.0)
    kinds: dict[str, list[tuple[Resource, float]]] = {"disk": [], "processors": []}
    if not setup.on_cores:
        kinds["GPU"] = []

    def process(disk: Resource, cores: Resource, compute: Resource) -> Process:
        nonlocal num_arrived
        load = partial(load_images, setup, fresh, disk, cores, generator)
        images = Loaded(world, load, setup.num_loaders, setup.images_ahead)
        read = partial(load_features, setup, from_disk, disk, cores)
        features = Loaded(world, read, setup.num_readers, setup.features_ahead)
        while True:
            for _ in range(setup.micro_batches):
                if fresh:
                    yield from images.take()
                    yield compute, setup.batch_size * fresh * setup.encode_s
                if from_disk:
                    yield from features.take()
            seconds = setup.micro_batch_s + setup.batch_size * setup.caption_s
            varied = 1 + setup.variation * generator.gauss(0, 1)
            yield compute, setup.micro_batches * seconds * varied
            num_arrived += 1
            if num_arrived % setup.size:
                yield arrived
            else:  # the last one
                marks.append((world.now_s, [r.worked for r in world.resources]))
                world.is_over = len(marks) > NUM_WARM_UPS + NUM_STEPS
                arrived.fire()
            yield network, setup.exchange_s
            yield compute, setup.update_s

    for _ in range(setup.num_machines):
        disk = world.resource(lambda num: setup.disk_bytes_per_s / num)
        cores = world.resource(setup.core_speed)
        kinds["disk"].append((disk, setup.disk_bytes_per_s))
        kinds["processors"].append((cores, setup.num_cores * setup.busy_speed))
        for _ in range(setup.num_processes):
            compute = cores if setup.on_cores else world.resource(lambda num: 1 / num)
            if not setup.on_cores:
                kinds["GPU"].append((compute, 1.0))
            world.ready.append(process(disk, cores, compute))
    world.run()
    (begin_s, before), (end_s, after) = marks[NUM_WARM_UPS], marks[-1]
    worked = {r: b - a for r, a, b in zip(world.resources, before, after)}
    seconds = end_s - begin_s
    busy = {
        kind: sum(worked[r] / (speed * seconds) for r, speed in members) / len(members)
        for kind, members in kinds.items()
    }
    busy["exchange"] = setup.exchange_s * NUM_STEPS / seconds
    captions = setup.size * setup.micro_batches * setup.batch_size * NUM_STEPS
    return Outcome(captions / seconds, busy)


# --- plans ----------------------------------------------------------------------------------------

PLANS: dict[str, dict[str, Any]] = {  # features kept: changes of the setup
    "none": {"kept_share": 0.0},
    "disk, bf16": {},
    "disk, int8": {"feature_bytes": 446e3, "feature_s": 0.075e-3},
    "memory": {"memory_share": 1.0},
}


def plans(setup: Setup, *, is_one: bool) -> str:
    """Images/s of a first and of later epochs as a table: for the setup, or for 1 to 32 GPUs."""
    rows = [["machines x GPUs, features kept", "first epoch", "efficiency", "busiest",
             "later epochs", "efficiency", "busiest"]]
    sizes = [(setup.num_machines, setup.num_processes)] if is_one else [(1, 1), (1, 8), (4, 8)]
    for num_machines, num_processes in sizes:
        for kept, changes in ({"as given": {}} if is_one else PLANS).items():
            one = dataclasses.replace(setup, num_machines=1, num_processes=1, **changes)
            many = dataclasses.replace(one, num_machines=num_machines, num_processes=num_processes)
            rows.append([f"{num_machines} x {num_processes}, {kept}"])
            for is_first in (True, False):
                rows[-1] += shown(many, one, is_first=is_first)
    return table(rows)


def shown(many: Setup, one: Setup, *, is_first: bool) -> list[str]:
    outcome = simulate(many, is_first=is_first)
    alone = simulate(one, is_first=is_first)
    efficiency = outcome.images_per_s / (many.size * alone.images_per_s)
    return [f"{outcome.images_per_s:,.0f}", f"{efficiency:.2f}", outcome.limits]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = [field for field in dataclasses.fields(Setup) if field.type is not bool]
    for field in numbers:
        parser.add_argument(f"--{field.name}", type=field.type, help=f"default: {field.default:g}")
    parser.add_argument("--validate", action="store_true", help="compare with real runs here")
    parser.add_argument("--model", default="blip", help="of --validate")
    parser.add_argument("--quick", action="store_true", help="of --validate: a small model")
    arguments = parser.parse_args(argv)
    if arguments.validate:
        from benchmarks.scaling_runs import validate

        validate(arguments.model, quick=arguments.quick)
        return
    values = {field.name: getattr(arguments, field.name) for field in numbers}
    given = {name: value for name, value in values.items() if value is not None}
    print(plans(dataclasses.replace(Setup(), **given), is_one="num_processes" in given))


if __name__ == "__main__":
    main()
