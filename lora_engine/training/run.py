"""A run under way: its folder, validations, checkpoints, and how it ends."""

import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import islice, tee
from typing import Any

import numpy as np
import torch

from lora_engine.captioning.metrics import Scores
from lora_engine.config import TrainingConfig, changes_on_resume
from lora_engine.data.batches import (
    CaptionedImages,
    SampleIndex,
    StepRows,
    training_steps,
    validation_order,
)
from lora_engine.data.read_pairs import paths_of, read_by_name
from lora_engine.devices import describe, peak_memory_bytes
from lora_engine.features.loader import FeatureLoader
from lora_engine.features.source import FeatureSource
from lora_engine.lora.matmul import describe_kernels
from lora_engine.ranks import dealt, share
from lora_engine.report.hub import push_adapter
from lora_engine.report.live import LiveReport
from lora_engine.report.loss_curve import draw_loss_curve
from lora_engine.report.metrics_log import MetricsLogger, averaged
from lora_engine.report.model_card import write_model_card
from lora_engine.report.run_folder import RunFolder, environment
from lora_engine.report.summary import BestAverage, TrainingSummary
from lora_engine.report.trackers import start_tracker
from lora_engine.stopping import Interrupted, StopSignal, TrainingStopped, signals_held
from lora_engine.terminal import counted, one_line
from lora_engine.training.agreement import TrainingStep, agreed_steps
from lora_engine.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    restore_moments,
)
from lora_engine.training.checkpoint_writer import CheckpointWriter
from lora_engine.training.eva import NUM_ROWS, initialize_eva
from lora_engine.training.meter import Meter
from lora_engine.training.schedule import Schedule
from lora_engine.training.setup import (
    RunSetup,
    best_adapter,
    feature_loader,
    feature_source,
    log_opening,
    run_folder,
    sizes,
)
from lora_engine.training.skipped_rows import SkippedRows
from lora_engine.training.validation import Validation
from lora_engine.training.validation_captions import ValidationCaptions

logger = logging.getLogger(__name__)

Callback = Callable[[dict[str, Any]], object]

_NUM_SPARE_FILES = 8  # file descriptors


@contextmanager
def open_run(setup: RunSetup, callback: Callback | None = None) -> Iterator["Run"]:
    """A run in its folder, before its first step or restored to its checkpoint.

    `callback` is called with each line of metrics.jsonl; if it fails, the run ends as after a
    signal. When the context ends, a checkpoint of the last whole step, the report and the summary
    are written, also after an error.
    """
    config, data, trainer, ranks = setup.config, setup.data, setup.trainer, setup.ranks
    schedule = Schedule(config, len(data.train_set))
    with (
        run_folder(setup, schedule) as folder,
        signals_held() as stop,
        MetricsLogger(
            folder.metrics,
            first_step=0 if setup.checkpoint is None else setup.checkpoint.step,
            total_steps=schedule.total_steps,
            tracker=start_tracker(
                config.track if ranks.is_main else "none", folder.path, config.as_dict()
            ),
            on_lost_output=stop.lose_output,
            on_record=partial(stop.call, callback or (lambda line: None)),
            is_writer=folder.is_writer,
        ) as metrics,
        feature_source(setup) as features,
        ExitStack() as spare_files,
    ):
        # Held open, so that the last checkpoint can be written even if descriptors have run out.
        for _ in range(_NUM_SPARE_FILES):
            spare_files.enter_context(open(os.devnull))
        folder.write_json("config.json", config.as_dict())
        facts = _environment(setup, schedule)
        folder.write_json("environment.json", facts)
        if ranks.is_main:
            log_opening(setup, folder, features)
        run = Run(setup, schedule, folder, metrics=metrics, features=features, stop=stop)
        if setup.checkpoint is not None:
            run.restore(setup.checkpoint)
        elif config.init_lora_weights == "eva" and config.init_adapter is None:
            run.initialize_eva()
        try:
            yield run
            facts["total_s"] = run.seconds
            facts["peak_memory_bytes"] = peak_memory_bytes(trainer.device)
            folder.write_json("environment.json", facts)
        except (Exception, Interrupted) as received:
            error = ranks.cause(received)
            spare_files.close()
            run.take_over_if_needed()
            run.save_last_step()
            with suppress(OSError):
                folder.write_json("environment.json", facts | {"stopped": one_line(error)})
            # The process that writes knows the newest checkpoint, and says so.
            advice = run.checkpoints.how_to_resume() if folder.is_writer else ""
            if isinstance(error, OSError) and error is not stop.error:
                raise TrainingStopped(
                    f"{error}. What was there before is intact. {advice}".rstrip()
                ) from error
            if run.has_begun and advice:
                error.add_note(advice)
            if run.has_begun and isinstance(error, TrainingStopped):
                is_first = "" if run.best.step else " (before training)"
                error.add_note(
                    f"the best adapter so far, of step {run.best.step}{is_first}, is in "
                    f"{folder.adapter}"
                )
            raise error
        finally:
            if run.has_begun and not stop.is_at_once:
                run.write_results()
        run.summary = run.summarize()
        logger.info(f"\n{run.summary}")
        if config.push_to_hub is not None and ranks.is_main:
            push_adapter(folder, config.push_to_hub)
        stop.answer_at_once()  # only the cache and the tracker are still to be closed


def _environment(setup: RunSetup, schedule: Schedule) -> dict[str, Any]:
    """What environment.json says of a run that begins."""
    device, dtype = setup.trainer.device, setup.trainer.dtype
    facts = environment(describe(device), dtype, describe_kernels(device, dtype))
    return facts | sizes(setup) | {
        "processes": setup.ranks.size,
        "total_steps": schedule.total_steps,
        "tokenizer_fingerprint": setup.fingerprints["tokenizer"],
    }


class Run:
    """A run's state outside the trainer, its validations and checkpoints; `step` steps are done."""

    summary: TrainingSummary  # when it has ended

    def __init__(
        self,
        setup: RunSetup,
        schedule: Schedule,
        folder: RunFolder,
        *,
        metrics: MetricsLogger,
        features: FeatureSource,
        stop: StopSignal,
    ) -> None:
        config, data = setup.config, setup.data
        self.setup = setup
        self.ranks = setup.ranks
        self.trainer = setup.trainer
        self.schedule = schedule
        self.folder = folder
        self.metrics = metrics
        self.features = features
        self.stop = stop
        self.step = 0
        self.loader: FeatureLoader | None = None  # of the training images
        self.meter = Meter(metrics, schedule, has_grad_scaler=self.trainer.scaler.is_enabled())
        self.best = best_adapter(setup, folder)
        average = self.trainer.average
        self.best_average = None if average is None else best_adapter(setup, folder, average)
        every_steps, every_s = config.save_interval()
        self.checkpoints = CheckpointWriter(
            folder,
            every_steps=every_steps,
            every_s=every_s,
            keep_last=config.keep_last,
            kept_step=schedule.decay_start if config.lr_schedule == "wsd" else None,
        )
        self.skipped = SkippedRows(
            folder, max_share=config.max_bad_share, num_rows=len(data.train_set)
        )
        self.skipped.begin(data.rows.bad, is_listed=setup.checkpoint is not None)
        captions = ValidationCaptions(
            setup.captioner,
            data.rows.val,
            num_scored=config.eval_captions,
            num_samples=config.num_samples,
        )
        order = validation_order(data.val_set.captions.lengths, batch_size=config.batch_size)
        self.validation = Validation(
            setup.captioner,
            self._loader(data.val_set, dealt(order, self.ranks)),
            self._loader(data.val_set, dealt(captions.order(config.batch_size), self.ranks)),
            captions=captions,
            skipped=self.skipped,
            metrics=metrics,
            ranks=self.ranks,
        )
        rows = data.rows.val
        images = {rows[row].image: int(rows.image_of_row[row]) for row in captions.wanted}
        self.report = LiveReport(folder, read=lambda name: (
            rows.images.read(images[name]) if name in images else read_by_name(name)
        ))
        self._begin_s = setup.begin_s
        self._is_consistent = True

    # --- data --------------------------------------------------------------------------------

    def steps(self) -> Generator[TrainingStep]:
        """The steps that are left, each once all processes have agreed to take it."""
        plans, order = tee(islice(self._plans(self.step), self.schedule.total_steps - self.step))
        self.loader = self._loader(self.setup.data.train_set, (
            batch
            for plan in order
            for batch in (plan.micro_batches[m] for m in share(len(plan.micro_batches), self.ranks))
            if batch
        ))
        with closing(iter(self.loader)) as batches:
            yield from agreed_steps(
                plans,
                batches,
                first_step=self.step + 1,
                ranks=self.ranks,
                stop=self.stop,
                splitter=self.trainer.splitter,
                is_save_due=self.checkpoints.is_due,
            )

    def initialize_eva(self) -> None:
        """Set the A matrices by the rows of the first steps, of one epoch at most; the same in all
        processes."""
        order, num_rows = [], 0
        for plan in islice(self._plans(0), self.schedule.steps_per_epoch):
            order += [batch for batch in plan.micro_batches if batch]
            num_rows += len(plan.rows)
            if num_rows >= NUM_ROWS:
                break
        logger.info(f"computing principal components of layer inputs on {num_rows} captions")
        with closing(iter(self._loader(self.setup.data.train_set, order))) as batches:
            initialize_eva(self.trainer.model, batches, device=self.trainer.device)
        if self.trainer.average is not None:
            self.trainer.average.values.copy_(self.trainer.lora.values.detach())

    def _plans(self, num_done_steps: int) -> Iterator[StepRows]:
        config, train_set = self.setup.config, self.setup.data.train_set
        epoch, num_done = self.schedule.position(num_done_steps)
        return training_steps(
            train_set.captions.lengths,
            batch_size=config.batch_size,
            seed=config.seed,
            num_epochs=config.epochs,
            grad_accum_steps=config.grad_accum_steps,
            micro_batches=config.micro_batches,
            first_epoch=epoch,
            num_done=num_done,
            block_ends=train_set.block_ends,
        )

    @property
    def waited_s(self) -> float:
        """Time that this process has waited for training images, in seconds."""
        return 0.0 if self.loader is None else self.loader.waited_s

    def paths_of(self, step: TrainingStep) -> list[str]:
        """The images of a step."""
        rows = [row for batch in step.rows for row in batch]
        return self.setup.data.train_set.paths_of(rows)

    def _loader(
        self, dataset: CaptionedImages, order: Iterable[list[SampleIndex]]
    ) -> FeatureLoader:
        return feature_loader(
            dataset,
            order,
            features=self.features,
            captioner=self.setup.captioner,
            config=self.setup.config,
            stop=self.stop,
            local_size=self.ranks.local_size,
        )

    # --- progress ----------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Time that the run has taken so far, in earlier processes too."""
        return time.monotonic() - self._begin_s

    @property
    def has_begun(self) -> bool:
        """Whether the validation before the first step is done."""
        return 0 in self.best.losses

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Changes within the context belong together: if one fails, no checkpoint is written."""
        self._is_consistent = False
        try:
            yield
        except TrainingStopped:  # raised between two parts, by the run itself
            self._is_consistent = True
            raise
        self._is_consistent = True

    def validate(self) -> None:
        """Validate the current step, record the results, and save the adapter if it is the best;
        the same for the moving average.

        Raises as `Validation.measure`, before anything is written.
        """
        step, captions, best_average = self.step, self.validation.captions, self.best_average
        ema: tuple[float, Scores | None] | None = None
        if best_average is not None:
            with best_average.in_place():  # first, so that the captions of this step are replaced
                ema = self.validation.measure(step)
        loss, scores = self.validation.measure(step)
        with self.atomic():
            self.metrics.record(
                "validation",
                step=step,
                epoch=step / self.schedule.steps_per_epoch,
                loss=loss,
                **_known(scores),
                **({} if ema is None else averaged(ema[0], _known(ema[1]))),
            )
            is_best = self.best.offer(step, loss, scores)
            by = "lowest loss" if self.best.by == "loss" or captions.remark else "highest CIDEr-D"
            best = f" ({by} so far)" if is_best and step else ""
            remark = captions.remark if scores else ""
            found = f"loss {loss:z.4f}{_cider_d(scores)}{remark}{best}"
            if best_average is not None and ema is not None:
                best_average.offer(step, *ema)
                found += f"; moving average: loss {ema[0]:z.4f}{_cider_d(ema[1])}"
            logger.info(f"step {step}: validation {found}")
            captions.write(self.folder, step)
            if is_best:
                captions.write_best(self.folder, step)
        self.metrics.track("samples", step=step, rows=[
            (os.path.basename(sample.image), sample.reference, sample.before, sample.after)
            for sample in captions.compare(step)
        ])
        if step < self.schedule.total_steps:  # after which `write_results` does
            self.report.update()

    # --- checkpoints -------------------------------------------------------------------------

    def is_save_due(self, agreed: TrainingStep) -> bool:
        """Whether it is time for a checkpoint: after a new best adapter, or by --save_every.

        Several processes have voted on that before the step, because their clocks differ.
        """
        is_due = self.checkpoints.is_due(self.step) if self.ranks.size == 1 else agreed.is_save_due
        return is_due or self.best.step == self.step

    def save(self, *, together: bool = True) -> None:
        """Write a checkpoint, unless this step has one, the run has not begun, or an `atomic`
        change failed.

        All processes save `together`, except after an error. Raises TrainingStopped if their
        matrices differ.
        """
        is_validated = self.step in self.best.losses
        is_saved = self.checkpoints.has(self.step, is_validated=is_validated)
        if is_saved or not self.has_begun or not self._is_consistent:
            return
        if not together and not self.folder.is_writer:
            return
        if together:
            self._compare_processes()
        is_written = self.checkpoints.write(
            self.step,
            is_validated=is_validated,
            best=self.best,
            best_average=self.best_average,
            optimizer=self.trainer.optimizer,
            digests=self.setup.data.digests,
            state=self._state(),
        )
        if together:  # all must know, because they try again together
            (is_written, *_) = self.ranks.gather(is_written)
        if is_written:
            self.checkpoints.note(self.step, is_validated=is_validated)
            self.metrics.forget()

    def _compare_processes(self) -> None:
        """Check that all have computed the same matrices, and share what they know of images."""
        if self.ranks.size == 1:
            return
        matrices = self.trainer.lora.digest()
        everyone = self.ranks.gather(matrices)
        for rank, theirs in enumerate(everyone):
            if theirs != everyone[0]:
                self._is_consistent = False
                raise TrainingStopped(
                    f"after step {self.step} the LoRA matrices of {self.ranks.name(rank)} are not "
                    f"those of {self.ranks.name(0)}: is the memory of a machine faulty, or its "
                    f"processor of another kind? The checkpoints before this step are intact"
                )
        for images in (self.setup.data.train_set.images, self.setup.data.val_set.images):
            # What is not known is 0, so the largest of all is what any of them knows.
            known = torch.from_numpy(images.digests.view(np.uint8))
            known.copy_(self.ranks.maximum(known))

    def take_over_if_needed(self) -> None:
        """Become the process that writes, if the one that was has gone."""
        if not self.ranks.is_main or self.folder.is_writer:
            return
        for is_last in [False] * 30 + [True]:
            try:
                self.folder.take_over()
                self.metrics.take_over()
                return
            except (OSError, ValueError) as error:  # it is ending, or is on another machine
                if is_last:
                    logger.warning(f"no checkpoint of step {self.step}: {error}")
            time.sleep(0.1)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total_steps": self.schedule.total_steps,
            "settings": self.setup.config.as_dict(),
            "fingerprints": self.setup.fingerprints,
            "compute_dtype": str(self.trainer.dtype),
            "scaler": self.trainer.scaler.state_dict(),
            "micro_batch_rows": self.trainer.splitter.num_rows,
            "validations": self.best.state_dict(),
            **({} if self.best_average is None else {
                "average_validations": self.best_average.state_dict()
            }),
            "captions": self.validation.captions.state_dict(self.best.step),
            "meter": self.meter.state_dict(),
            "seconds": self.seconds,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore everything but the adapter, which is loaded with the model."""
        state = checkpoint.state
        if checkpoint.step > self.schedule.total_steps:
            raise CheckpointError(
                f"{checkpoint.path} is of step {checkpoint.step}, but this run has "
                f"{counted(self.schedule.total_steps, 'step')}"
            )
        trainer = self.trainer
        restore_moments(trainer.optimizer, trainer.lora, checkpoint, trainer.average)
        if self.trainer.scaler.is_enabled():
            self.trainer.scaler.load_state_dict(state["scaler"])
        self.trainer.splitter.num_rows = state["micro_batch_rows"]
        self.best.load_state_dict(state["validations"])
        self.validation.captions.load_state_dict(state["captions"])
        self.meter.load_state_dict(state["meter"])
        self._begin_s -= state["seconds"]
        self.step = checkpoint.step
        self.checkpoints.restore(checkpoint)
        self._log_resumption(checkpoint)
        self.skipped.restore(self.setup.data.train_set, self._rows_tried())
        self.best.restore(checkpoint, checkpoint.best_files)
        if self.best_average is not None:
            self.best_average.load_state_dict(state["average_validations"])
            self.best_average.restore(checkpoint, checkpoint.average_files)
        self.validation.captions.write_best(self.folder, self.best.step)
        self.report.update()

    def _log_resumption(self, checkpoint: Checkpoint) -> None:
        before, now = checkpoint.state["total_steps"], self.schedule.total_steps
        if self.step < now:
            logger.info(f"resuming after step {self.step} of {now}, from {checkpoint.path}")
        else:
            logger.info(
                f"the run in {self.folder.path} is finished (step {self.step} of {now}); to train "
                f"on, resume it with a higher {' and '.join(self.schedule.limits)}"
            )
        changes = changes_on_resume(checkpoint.settings, self.setup.config)
        if changes:
            logger.info(f"with other settings: {', '.join(changes)}")
        if before != now:
            logger.info(
                f"from here on the learning rate is that of a run of {counted(now, 'step')}, not "
                f"{before} (--lr_schedule {self.setup.config.lr_schedule}): the next step's is "
                f"{self.schedule.learning_rate(self.step + 1):.3g}"
            )

    def _rows_tried(self) -> list[int]:
        """The training rows that were loaded up to this step."""
        epoch, num_done = self.schedule.position(self.step)
        if epoch:
            return list(range(len(self.setup.data.train_set)))
        return [row for plan in islice(self._plans(0), num_done) for row in plan.rows]

    # --- the end -----------------------------------------------------------------------------

    def save_last_step(self) -> None:
        """Write a checkpoint after an error, which a second error must not hide."""
        try:
            self.save(together=False)
        except TrainingStopped:  # raised again for the same reason
            pass
        except Exception as error:  # a GPU that has failed raises on every call
            logger.warning(f"no checkpoint of step {self.step}: {error}")

    def write_results(self) -> None:
        """Write what people read and use; a failure neither ends a run nor hides why it ended."""
        if not self.folder.is_writer:
            return
        writes: dict[str, Callable[[], object]] = {
            "the loss curve": partial(draw_loss_curve, self.folder.metrics, self.folder.loss_curve),
            "the model card": partial(write_model_card, self.folder),
            "the report": self.report.finish,
        }
        if self._is_consistent:
            writes = {"the last adapter": partial(self.best.save_last, self.step)} | writes
        for name, write in writes.items():
            try:
                write()
            except Exception as error:  # a full disk, a file that somebody changed
                logger.warning(f"{name} could not be written: {type(error).__name__}: {error}")

    def summarize(self) -> TrainingSummary:
        average = self.best_average
        return TrainingSummary(
            path=self.folder.path,
            losses=self.best.losses,
            scores=self.best.scores,
            best_by=self.best.by,
            best_step=self.best.step,
            average=None if average is None else BestAverage(
                average.step,
                average.losses[average.step],
                average.scores.get(average.step),
            ),
            num_skipped_images=self.skipped.num_images,
            num_skipped_rows=len(self.setup.data.rows.bad),
            samples=self.validation.captions.compare(self.best.step),
            seconds=self.seconds,
            val_flags=_val_flags(self.setup.config),
        )


def _val_flags(config: TrainingConfig) -> tuple[str, ...]:
    """The flags with which `evaluate` reads the validation data; none if it has no path."""
    if config.val_data_path is None:
        return ()
    flags = ["--data", *paths_of(config.val_data_path)]
    for name in ("data_format", "image_field", "caption_field", "image_root"):
        value = getattr(config, name)
        if value not in (None, "auto"):
            flags += [f"--{name}", value]
    return tuple(flags)


def _known(scores: Scores | None) -> dict[str, float]:
    return {} if scores is None else scores.as_dict()


def _cider_d(scores: Scores | None) -> str:
    return "" if scores is None else f", CIDEr-D {scores.cider_d:z.3f}"
