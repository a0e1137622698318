"""The one training loop: a method on the data of one fold, resumable at every step.

Order inside an epoch: steps, metrics off the device (NaN guard), evaluation, early stopping, checkpoint. A request to
stop (signal) is honoured after the step in flight, with a checkpoint, at any step of an epoch.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.cohort import Cohort
from histokd_jax.tasks import Table
from histokd_jax.train import distributed, encoder_folders, evaluate, findings, held, preparation, schedules
from histokd_jax.train.checkpoint import RunCheckpoints
from histokd_jax.train.experiment import FoldData
from histokd_jax.train.feed import Feeder
from histokd_jax.train.held import Held
from histokd_jax.train.programs import Programs
from histokd_jax.train.signals import Interrupted, StopRequest
from histokd_jax.train.state import TrainState, init_params
from histokd_jax.train.stopping import Plateau, Stopper
from histokd_jax.train.writer import MetricWriter, NoWriter
from histokd_jax.types import Stage

STUDENT_GROUP = "S_P"


class DivergedError(RuntimeError):
    """A loss or metric became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a fold stands; saved with every checkpoint.

    Attributes:
      stage: index of the stage.
      step: steps done in it.
      epoch: epochs completed in it, evaluation included.
      stopper: early-stopping state.
      plateau: state of a learning rate that falls on a plateau.
    """

    stage: int = 0
    step: int = 0
    epoch: int = 0
    stopper: Stopper = Stopper()
    plateau: Plateau = Plateau()

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Progress:
        """Inverse of `to_json`."""
        states = {"stopper": Stopper(**facts["stopper"]), "plateau": Plateau(**facts.get("plateau", {}))}
        return cls(**{**facts, **states})

    def monitored(self, cfg: ConfigDict, value: float, epoch: int) -> tuple[Progress, bool]:
        """The state after the monitor of an epoch is known, and whether the epoch is the best so far."""
        stopper, improved = self.stopper.update(value, epoch, cfg.early_stop.get("ties_improve", False))
        plateau = self.plateau
        if cfg.train.lr_schedule == schedules.PLATEAU:
            plateau = plateau.update(value, cfg.train.plateau_patience)
        return dataclasses.replace(self, stopper=stopper, plateau=plateau), improved

    def rates(self, cfg: ConfigDict, steps: int) -> np.ndarray:
        """[steps] float64: learning rate of every step of the present epoch."""
        scale = self.plateau.scale(cfg.train.plateau_factor) if self.plateau.reductions else 1.0
        return scale * schedules.step_rates(cfg.train, self.epoch, steps)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One fold of one arm.

    Attributes:
      cfg: resolved configuration.
      programs: compiled steps, shared between folds.
      feeder: gives the batches, shared between folds.
      cohort: samples, for joining predictions.
      data: planned batches.
      fold: number of the fold.
      directory: the fold's folder.
      identity: facts that must not change when resuming.
      title: shown on the progress bar.
      frozen: networks that are not trained, see `Method.forward`; neither differentiated nor in any checkpoint.
      held: those of them that an earlier stage of this run has trained; they are evaluated as well.
      starts: networks that do not start at random.
    """

    cfg: ConfigDict
    programs: Programs
    feeder: Feeder
    cohort: Cohort
    data: FoldData
    fold: int
    directory: pathlib.Path
    identity: Mapping[str, str]
    title: str = ""
    frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    held: Held = dataclasses.field(default_factory=Held)
    starts: encoder_folders.Starts = dataclasses.field(default_factory=encoder_folders.Starts)

    @property
    def modes(self) -> tuple[str, ...]:
        """Every mode of the method."""
        return tuple(mode.name for mode in self.programs.method.modes)


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """What training leaves.

    Attributes:
      params: the selected parameters.
      extra: extra state.
      progress: final progress of the last stage.
      fill: valid patches / capacity of the training plan.
    """

    params: Any
    extra: Any
    progress: Progress
    fill: float


def fit(job: Job, stop: StopRequest) -> Fit:
    """Trains all stages of a method on one fold, continuing from the newest checkpoint if there is one.

    Raises:
      Interrupted: a signal arrived; a checkpoint was written.
      DivergedError: a loss became NaN or infinite.
      CheckpointMismatchError: the folder holds checkpoints of another method, configuration or input.
    """
    method = job.programs.method
    params, extra, rng = init_params(method, job.cfg.seed)
    params, extra = encoder_folders.placed(job.starts, params, extra)
    example = job.feeder.shapes(job.data.train)
    with RunCheckpoints(job.directory / "checkpoints", job.identity, job.cfg.ckpt.keep) as checkpoints:
        saved = checkpoints.progress()
        distributed.check_agreement({"newest checkpoint": saved}, f"where fold {job.fold} stands")
        progress = Progress.from_json(saved) if saved else Progress()
        upto = global_step(job, progress) if saved else -1
        if not saved:
            params, extra = preparation.prepare(method, job.cfg, job.data.train, job.feeder, params, extra)
        with MetricWriter(job.directory, upto) if distributed.is_main() else NoWriter() as writer:
            for index in range(progress.stage, len(method.stages)):
                stage = method.stages[index]
                key = jax.random.fold_in(rng, index)
                if saved:
                    params, extra = held.read(job.directory, held.groups(job.cfg, stage, params), params, extra)
                params, extra, aside = held.divide(job.cfg, stage, params, extra)
                staged = _holding(job, aside)
                state = job.programs.start(stage, params, extra, key, example, staged.frozen)
                if saved:
                    state, saved = checkpoints.restore(state), None
                    logging.info("resumed at stage %s, step %d", stage.name, progress.step)
                else:
                    progress = Progress(stage=index)
                    held.write(job.directory, aside)
                runner = _StageRunner(staged, stage, checkpoints, writer, stop)
                state, progress = runner.run(state, progress)
                params = selected_params(job.cfg, stage, state, progress)
                params, extra = aside.beside(params, selected_extra(job.cfg, state, progress))
    return Fit(job.programs.whole(params), extra, progress, job.data.train.plan.fill())


def _holding(job: Job, aside: Held) -> Job:
    """The job of a stage that holds networks of an earlier one."""
    if not aside.params:
        return job
    return dataclasses.replace(job, frozen={**job.frozen, **job.programs.whole(aside.frozen)}, held=aside)


def stopped_early(cfg: ConfigDict, progress: Progress) -> bool:
    """Whether early stopping ends the stage after the epochs done."""
    early = cfg.early_stop
    return early.enabled and progress.stopper.should_stop(
        progress.epoch - 1, patience=early.patience, min_epoch=early.min_epoch
    )


def global_step(job: Job, progress: Progress) -> int:
    """Steps since the start of the first stage."""
    return progress.stage * job.data.train.num_steps + progress.step


def selected_params(cfg: ConfigDict, stage: Stage, state: TrainState, progress: Progress) -> dict[str, Any]:
    """The parameters a stage ends with: the best, the last (fixed epochs), or the published mixture of both."""
    if not cfg.early_stop.enabled or progress.stopper.best is None:
        return state.params
    if cfg.ckpt.teachers == "last_epoch" and STUDENT_GROUP in stage.trainable:
        return {**state.params, STUDENT_GROUP: state.best_params[STUDENT_GROUP]}
    return state.best_params


def selected_extra(cfg: ConfigDict, state: TrainState, progress: Progress) -> Any:
    """The extra state that belongs to `selected_params`: running statistics must be those of the chosen epoch."""
    chosen = cfg.early_stop.enabled and progress.stopper.best is not None
    return state.best_extra if chosen else state.extra


class _StageRunner:
    """Runs the epochs of one stage."""

    def __init__(self, job: Job, stage: Stage, checkpoints: RunCheckpoints, writer: MetricWriter, stop: StopRequest):
        self.job, self.stage = job, stage
        self.checkpoints, self.writer, self.stop = checkpoints, writer, stop
        self.plan = job.data.train.plan

    def run(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        cfg = self.job.cfg
        batches = self.job.feeder.train(self.job.data.train, progress.step)
        total = cfg.train.max_epochs * self.plan.steps_per_epoch
        # disable=None: no bar when the output is not a terminal.
        with tqdm(
            total=total, initial=progress.step, desc=self.job.title or self.stage.name, unit="step", disable=None
        ) as bar:
            while progress.epoch < cfg.train.max_epochs and not stopped_early(cfg, progress):
                state, progress, timing = self._epoch_steps(state, progress, batches, bar)
                state, progress = self._end_epoch(state, progress, timing, bar)
        return state, progress

    def _epoch_steps(self, state, progress, batches, bar):
        cfg, programs = self.job.cfg, self.job.programs
        rates = progress.rates(cfg, self.plan.steps_per_epoch)
        first, began, waited, patches, sent, loss = progress.step, time.perf_counter(), 0.0, 0, 0, None
        # Nothing may reach or leave a device unasked: such a transfer would make every step wait for the host.
        with jax.transfer_guard("disallow"):
            while progress.step < (progress.epoch + 1) * self.plan.steps_per_epoch:
                asked = time.perf_counter()
                fed = next(batches)
                waited += time.perf_counter() - asked
                # At most one step in flight: dispatch would otherwise run ahead and hold every batch in memory.
                jax.block_until_ready(loss)
                rate = float(rates[progress.step % self.plan.steps_per_epoch])
                state, loss = programs.train(self.stage, state, fed.batch, rate, self.job.frozen)
                patches, sent = patches + fed.patches, sent + fed.host_bytes
                progress = dataclasses.replace(progress, step=progress.step + 1)
                bar.update()
                if self.stop.requested:
                    self._interrupt(state, progress)
        jax.block_until_ready(loss)
        seconds = time.perf_counter() - began
        return (
            state,
            progress,
            {
                "lr": float(rates[-1]),
                "time_epoch": seconds,
                "time_data_wait": waited,
                "input_bound_fraction": waited / seconds,
                f"{self.job.feeder.unit}_per_second": patches / seconds,
                "host_bytes_per_step": sent / max(progress.step - first, 1),
            },
        )

    def _interrupt(self, state, progress):
        with jax.transfer_guard("allow"):
            self.checkpoints.save(global_step(self.job, progress), state, progress.to_json())
        raise Interrupted(
            f"stopped by signal {self.stop.signal} at step {progress.step} of fold {self.job.fold} after writing a "
            "checkpoint; run the same command again to continue"
        )

    def _end_epoch(self, state, progress, timing, bar):
        step, epoch = global_step(self.job, progress), progress.epoch
        facts = {"epoch": epoch, "stage": self.stage.name}
        means = self._epoch_means(state, epoch)
        findings.tell(self.job.directory, self.job.data.task.watch(means), f"epoch {epoch}")
        self.writer.write(step, {**facts, "split": "train"}, {**means, **timing})
        shown, improved = {"loss": f"{means['loss']:.3f}"}, False
        if "val" in self.job.data.evaluation:
            metrics = self._validate(state)
            # Hosts of different make may round differently, yet must stop at the same epoch.
            monitor = distributed.broadcast(self.job.data.task.monitor(metrics, self.stage.monitor_modes))
            self.writer.write(step, {**facts, "split": "val"}, {**metrics, "monitor": monitor})
            progress, improved = progress.monitored(self.job.cfg, monitor, epoch)
            shown |= {self.job.data.task.monitor_name: f"{monitor:.3f}", "best": f"{progress.stopper.best:.3f}"}
        progress = dataclasses.replace(progress, epoch=epoch + 1)
        state = _close_epoch(state, improved)
        bar.set_postfix(shown)
        last = progress.epoch == self.job.cfg.train.max_epochs or stopped_early(self.job.cfg, progress)
        if last or progress.epoch % self.job.cfg.ckpt.every_epochs == 0:
            self.checkpoints.save(step, state, progress.to_json())
        return state, progress

    def _epoch_means(self, state, epoch) -> dict[str, float]:
        totals = jax.device_get(state.totals)
        means = {name: float(total) / max(float(count), 1.0) for name, (total, count) in totals.items()}
        bad = sorted(name for name, value in means.items() if not np.isfinite(value))
        if bad:
            raise DivergedError(
                f"fold {self.job.fold}, stage {self.stage.name}, epoch {epoch}: {', '.join(bad)} became NaN or "
                "infinite; the newest checkpoint is from before; lower train.lr, clip the genes (genes.clip=5), or "
                "check the data"
            )
        return means

    def _validate(self, state) -> dict[str, float]:
        source = self.job.data.evaluation["val"]
        key = None
        if self.job.cfg.eval.teacher_dropout:
            key = jax.random.fold_in(jax.random.key(self.job.cfg.seed), int(state.step))
        found = predict_part(self.job, source, state.params, state.extra, key)
        return self.job.data.task.val_metrics(found, self.job.data.answers("val"))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _close_epoch(state: TrainState, improved: bool) -> TrainState:
    """Keeps the parameters if they are the best so far, and empties the metric sums."""
    if improved:
        best = jax.tree.map(jnp.copy, (state.params, state.extra))
    else:
        best = state.best_params, state.best_extra
    totals = jax.tree.map(jnp.zeros_like, state.totals)
    return state.replace(best_params=best[0], best_extra=best[1], totals=totals)


def predict_part(
    job: Job, source, params: Any, extra: Any, key: jax.Array | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """mode -> output -> [n, ...] of the samples of one evaluation plan; `key` turns on dropout in the teachers."""

    def predict(batch, number):
        step_key = None if key is None else jax.random.fold_in(key, number)
        return job.programs.predict(job.modes, params, extra, batch, step_key)

    params, extra = job.programs.whole(job.held.beside(params, extra))
    found = evaluate.predict_source(predict, source, job.feeder, job.data.task.outputs)
    # A jitted function returns dictionaries in the order of their keys; tables start with the deployed mode.
    return {mode: found[mode] for mode in job.modes}


def predictions(job: Job, part: str, result: Fit) -> Table:
    """Predictions of the selected parameters on "val" or "test"."""
    source, data = job.data.evaluation[part], job.data
    found = predict_part(job, source, result.params, result.extra)
    return evaluate.as_table(data.task, found, source.table.slide_index, job.cohort, data.targets, job.fold)
