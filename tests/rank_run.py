"""A training run for the tests of torchrun: python -m rank_run JSON

args         of recipes.finetune
given        another [flag, value] of single processes, by rank
signal       sent once, [step, rank or "launcher", number]: after that many steps, by that process
hung_s       the time without a beat after which a process is lost
join_s       the time for all processes to start
"""

import functools
import json
import os
import sys
import time

from lora_engine import ranks
from lora_engine.cli import reported_errors
from lora_engine.features import encoder, placement, sizing
from lora_engine.features.store import read_rate
from lora_engine.training import run, run_data, validation_captions
from lora_engine.training.trainer import Trainer
from recipes import finetune


def short_runs() -> None:
    """What the fixtures of conftest.py do for every test."""
    validation_captions.MAX_NEW_TOKENS, run_data.FEW_IMAGES = 2, 0
    placement.read_rate = functools.partial(read_rate, num_bytes=2**20)
    encoder._NUM_TIMED, sizing._BATCH_SIZES = 1, (2,)
    run.draw_loss_curve = lambda metrics, path: path.write_bytes(b"a picture")
    os.fsync = lambda descriptor: None


def send_signal(step: int, who: int | str, number: int) -> None:
    update, steps = Trainer.update, []

    def update_and_send(trainer, loss, **settings):
        result = update(trainer, loss, **settings)
        steps.append(loss)
        if len(steps) == step:
            os.kill(os.getppid() if who == "launcher" else os.getpid(), number)
            if who == "launcher":
                time.sleep(1.5)  # the rest of the run takes less than its end is noticed in
        return result

    if who in ("launcher", int(os.environ["RANK"])) and os.environ["LOCAL_RANK"] == str(
        0 if who == "launcher" else who
    ):
        Trainer.update = update_and_send


def main(request: dict) -> int:
    short_runs()
    ranks.HUNG_S = request.get("hung_s", ranks.HUNG_S)
    ranks.JOIN_S = request.get("join_s", ranks.JOIN_S)
    if "signal" in request and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        send_signal(*request["signal"])
    args = request["args"]
    given = request.get("given", {}).get(os.environ["RANK"])
    if given is not None:
        flag, value = given
        at = args.index(flag) if flag in args else len(args)
        args[at : at + 2] = [flag, value]
    return finetune.main(args)


if __name__ == "__main__":
    with reported_errors() as status:
        status.code = main(json.loads(sys.argv[1]))
    sys.exit(status.code)
