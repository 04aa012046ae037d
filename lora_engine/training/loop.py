"""The training loop: image-caption pairs and a frozen captioner in, a LoRA adapter out.

    pixels -> frozen encoder -> features (kept) -> decoder with LoRA -> loss -> gradients -> AdamW

A step is an optimizer step over `grad_accum_steps` micro-batches. Its loss is the sum over all
valid target tokens of the step, divided by their number: 4 x 16 rows are exactly 1 x 64.
"""

import logging
from contextlib import closing
from itertools import islice
from typing import Any

from lora_engine.config import TrainingConfig
from lora_engine.report.summary import TrainingSummary
from lora_engine.terminal import ConsoleHandler, logging_to
from lora_engine.training.run import open_run
from lora_engine.training.setup import prepare

logger = logging.getLogger(__name__)


def train(
    config: TrainingConfig,
    *,
    family: str | None = None,
    data: Any = None,
    val_data: Any = None,
) -> TrainingSummary:
    """Train an adapter as `config` says and save it in a run folder: a new one, or with
    `config.resume` that of the run to continue.

    `family`, a key of `families.FAMILIES`, refuses models of another kind. `data` and `val_data`
    take the place of the paths in `config`: a list of (image, caption or captions), with images as
    paths, PIL images, bytes of image files or uint8 arrays (height, width, 3), or a Hugging Face
    Dataset.

    Raises ValueError (or a subclass) for settings, data or a model that cannot be used;
    TrainingStopped or LoadingStopped when a run cannot continue; Interrupted after SIGINT, SIGTERM
    or SIGHUP, and when nobody reads the output any more. A checkpoint of the last whole step is
    written first, unless the optimizer or the log of a step failed halfway. A failure before the
    first validation removes what was written.
    """
    with (
        logging_to(ConsoleHandler()),
        open_run(prepare(config, family, data=data, val_data=val_data)) as run,
    ):
        trainer, schedule, meter = run.trainer, run.schedule, run.meter
        if schedule.validates(run.step) and run.step not in run.best.losses:
            run.validate()
        run.save()
        loader = run.training_loader()
        meter.begin()
        with closing(iter(loader)) as batches:
            for step in range(run.step + 1, schedule.total_steps + 1):
                run.stop.check()
                if config.patience is not None and run.best.num_worse >= config.patience:
                    logger.info(f"stopped: no better for {config.patience} validations")
                    break
                micro_batches = list(islice(batches, schedule.num_micro_steps(step)))
                run.skipped.add(micro_batches)
                loss = trainer.accumulate(micro_batches, step)  # forward and backward
                lr = schedule.learning_rate(step)
                with run.atomic():
                    grad_norm = trainer.update(loss, lr=lr)  # clipping and AdamW
                    run.step = step
                    images = loader.dataset.paths_of(micro_batches)
                    meter.add(step, loss, grad_norm, lr, images, loader.waited_s)
                    if schedule.logs(step):
                        meter.settle(step)
                    elif meter.is_overdue:
                        meter.read()
                if schedule.validates(step):
                    run.validate()
                    meter.restart()
                if run.is_save_due:
                    run.save()
        run.save()
    return run.summary
