"""The training loop: image-caption pairs and a frozen captioner in, a LoRA adapter out.

    pixels -> frozen encoder -> features (kept) -> decoder with LoRA -> loss -> gradients -> AdamW

A step is an optimizer step over some micro-batches, which processes share out. Its loss is the sum
over all valid target tokens of the step, divided by their number: 4 x 16 rows are exactly 1 x 64.
"""

import logging
from contextlib import closing, nullcontext
from typing import Any

from lora_engine.config import TrainingConfig
from lora_engine.ranks import Ranks, open_ranks
from lora_engine.report.summary import TrainingSummary
from lora_engine.terminal import ConsoleHandler, counted, logging_to
from lora_engine.training.run import Callback, open_run
from lora_engine.training.setup import prepare

logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig,
    *,
    family: str | None = None,
    data: Any = None,
    val_data: Any = None,
    ranks: Ranks | None = None,
    callback: Callback | None = None,
) -> TrainingSummary:
    """Train an adapter as `config` says and save it in a run folder: a new one, or with
    `config.resume` that of the run to continue.

    `family`, a key of `families.FAMILIES`, refuses models of another kind. `data` and `val_data`
    take the place of the paths in `config`: a list of (image, caption or captions), with images as
    paths, PIL images, bytes of image files or uint8 arrays (height, width, 3), or a Hugging Face
    Dataset. `ranks` are the processes of the run; by default those that torchrun has started.
    `callback` is called with each line of metrics.jsonl; its error ends the run as a signal does.

    Raises ValueError (or a subclass) for settings, data or a model that cannot be used;
    TrainingStopped or LoadingStopped when a run cannot continue; Interrupted after SIGINT, SIGTERM
    or SIGHUP, and when nobody reads the output any more. A checkpoint of the last whole step is
    written first, unless the optimizer or the log of a step failed halfway. A failure before the
    first validation removes what was written.
    """
    with (
        logging_to(ConsoleHandler()),
        nullcontext(ranks) if ranks is not None else open_ranks() as ranks,
        open_run(
            prepare(config, family, data=data, val_data=val_data, ranks=ranks), callback
        ) as run,
    ):
        trainer, schedule, meter = run.trainer, run.schedule, run.meter
        if schedule.validates(run.step) and run.step not in run.best.losses:
            run.validate()
        run.save()
        meter.begin()
        with closing(run.steps()) as steps:
            for agreed in steps:
                step = agreed.number
                if config.patience is not None and run.best.num_worse >= config.patience:
                    logger.info(
                        f"stopped: no better for {counted(config.patience, 'validation')}; "
                        f"adapter/ holds the best adapter, of step {run.best.step}"
                    )
                    break
                run.skipped.add(agreed.rows, agreed.skipped)
                loss = trainer.accumulate(  # forward and backward, and the sum over processes
                    agreed.batches, step, num_targets=agreed.num_targets, first=agreed.first
                )
                lr = schedule.learning_rate(step)
                with run.atomic():
                    grad_norm = trainer.update(loss, lr=lr)  # clipping and AdamW
                    run.step = step
                    meter.add(step, loss, grad_norm, lr, run.paths_of(agreed), run.waited_s)
                    if schedule.logs(step):
                        meter.settle(step)
                    elif meter.is_overdue:
                        meter.read()
                if schedule.validates(step):
                    run.validate()
                    meter.restart()
                if run.is_save_due(agreed):
                    run.save()
        run.save()
    return run.summary
