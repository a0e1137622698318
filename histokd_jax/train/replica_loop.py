"""Trains a group of replicas as one program: folds, seeds and weights of one method, each its own training.

The counterpart of `loop.fit`, with the same order inside an epoch. Every replica has its own data, keys, weights,
early stopping and best parameters; one that has stopped or diverged is frozen while the others go on. Replicas of
folds with fewer steps per epoch wait, masked, for the longest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from data_pipelines.pipeline import StepSource
from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.train import evaluate, preparation
from histokd_jax.train.checkpoint import CheckpointMismatchError, RunCheckpoints
from histokd_jax.train.feed import Fed, Feeder
from histokd_jax.train.loop import Fit, Job, Progress, global_step, selected_extra, selected_params, stopped_early
from histokd_jax.train.replica_step import ReplicaPrograms, make_layout, stack_batches
from histokd_jax.train.sharding import make_replica_mesh
from histokd_jax.train.signals import Interrupted, StopRequest
from histokd_jax.train.state import TrainState, init_params
from histokd_jax.train.writer import MetricWriter
from histokd_jax.types import Stage

FAILED_FILE = "failed.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Replica:
    """One training of a group.

    Attributes:
      name: for messages, e.g. "without_skd, seed 1, fold 3".
      job: what `loop.fit` would train alone. Replicas that read the same batches share one `FoldData` object.
      values: config keys that vary within the group -> number, see `Method.traced`.
    """

    name: str
    job: Job
    values: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where a replica stands; saved with every checkpoint.

    Attributes:
      progress: as in a single run.
      failed: why it was given up, "" if it was not.
    """

    progress: Progress = Progress()
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"progress": self.progress.to_json(), "failed": self.failed}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Standing:
        """Inverse of `to_json`."""
        return cls(Progress.from_json(facts["progress"]), facts["failed"])


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the group stands: all running replicas are in the same epoch.

    Attributes:
      stage: index of the stage.
      epoch: epochs completed in it.
      step: steps done of the present epoch.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0


def fit_group(
    replicas: Sequence[Replica],
    directory: pathlib.Path,
    stop: StopRequest,
    done: Callable[[Replica, Fit], None],
    title: str = "",
) -> dict[str, str]:
    """Trains all replicas, continuing from the newest checkpoint of the group if there is one.

    Args:
      replicas: of one method and graph, with equal shapes of all batches.
      directory: the group's folder; its checkpoints lie there, everything else in the folders of the jobs.
      stop: request to stop.
      done: called with every replica that was trained to its end, and its result.
      title: shown on the progress bar.

    Returns:
      Name of each replica that diverged -> why. Each has a failed.json in its folder.

    Raises:
      Interrupted: a signal arrived; a checkpoint was written.
      CheckpointMismatchError: the folder holds checkpoints of another configuration or input.
    """
    identity = {f"{r.name}: {fact}": value for r in replicas for fact, value in r.job.identity.items()}
    keep = replicas[0].job.cfg.ckpt.keep
    with RunCheckpoints(directory / "checkpoints", identity, keep) as checkpoints, contextlib.ExitStack() as stack:
        saved = checkpoints.progress()
        standing = [Standing() for _ in replicas]
        if saved:
            standing = [Standing.from_json(facts) for facts in saved["replicas"]]
        writers = []
        for replica, own in zip(replicas, standing):
            upto = global_step(replica.job, own.progress) if saved else -1
            writers.append(stack.enter_context(MetricWriter(replica.job.directory, upto)))
        run = _Group(replicas, standing, checkpoints, writers, stop, title)
        position = Position(**saved["position"]) if saved else Position()
        run.stages(position, resume=saved is not None, done=done)
        return {r.name: s.failed for r, s in zip(replicas, run.standing) if s.failed}


def failure(job: Job) -> str:
    """Why an earlier training of this job was given up, "" if it was not.

    Raises:
      CheckpointMismatchError: it was given up with another configuration or input.
    """
    path = job.directory / FAILED_FILE
    if not path.exists():
        return ""
    saved = json.loads(path.read_text())
    if saved["identity"] != dict(job.identity):
        raise CheckpointMismatchError(f"{path} is of another configuration or input; give another --workdir")
    return saved["reason"]


class _Streams:
    """The batches of a group, step by step: each plan is read once, whatever the number of replicas that use it."""

    def __init__(self, feeder: Feeder, sources: Sequence[StepSource]):
        self._feeder, self._sources = feeder, sources
        self._iterators: dict[int, Any] = {}
        self.latest: dict[int, Fed] = {}

    def advance(self, wanted: Mapping[int, int]) -> dict[int, Fed]:
        """The next step of some streams.

        Args:
          wanted: stream -> its step, from where it is read when it is asked for the first time.
        """
        fresh = {}
        for stream, at in wanted.items():
            if stream not in self._iterators:
                self._iterators[stream] = self._feeder.train(self._sources[stream], at)
            fresh[stream] = next(self._iterators[stream])
        # Streams that are over for this epoch keep their last batch: shapes must not change.
        self.latest |= fresh
        return fresh

    def drop(self, kept: set[int]) -> None:
        """Forgets the streams that no running replica reads any more, so that nothing is read ahead for them."""
        for stream in set(self._iterators) - kept:
            del self._iterators[stream]
            self.latest.pop(stream, None)


class _Group:
    """Runs the stages of a group."""

    def __init__(self, replicas, standing, checkpoints, writers, stop, title):
        self.replicas, self.standing = replicas, list(standing)
        self.checkpoints, self.writers, self.stop, self.title = checkpoints, writers, stop, title
        first = replicas[0].job
        self.cfg, self.feeder, self.modes = first.cfg, first.feeder, first.modes
        self.method = first.programs.method
        distinct = list({id(r.job.data): r.job.data for r in replicas}.values())
        number = {id(data): k for k, data in enumerate(distinct)}
        self.data, self.stream_of = distinct, [number[id(r.job.data)] for r in replicas]
        mesh = make_replica_mesh(self.cfg.mesh.replica)
        layout = make_layout(self.stream_of, mesh.size)
        self.programs = ReplicaPrograms(first.programs, self.cfg, layout, mesh)
        self.values = {key: np.array([r.values[key] for r in replicas], np.float32) for key in replicas[0].values}
        self.steps = np.array([r.job.data.train.plan.steps_per_epoch for r in replicas])

    @property
    def running(self) -> np.ndarray:
        """[R] bool: neither stopped early nor diverged."""
        return np.array(
            [not s.failed and not stopped_early(r.job.cfg, s.progress) for r, s in zip(self.replicas, self.standing)]
        )

    def stages(self, position: Position, resume: bool, done: Callable[[Replica, Fit], None]) -> None:
        inits = {seed: init_params(self.method, seed) for seed in {r.job.cfg.seed for r in self.replicas}}
        starts = [inits[r.job.cfg.seed] for r in self.replicas]
        if not resume:
            starts = self._prepared(starts)
        example = next(self.feeder.train(self.data[0].train)).batch
        for index in range(position.stage, len(self.method.stages)):
            stage = self.method.stages[index]
            keys = [(params, extra, jax.random.fold_in(rng, index)) for params, extra, rng in starts]
            state = self.programs.start(stage, keys, example, self.values)
            if resume:
                state = self.programs.pad(self.checkpoints.restore(self.programs.trim(state)))
                logging.info("group resumed at stage %s, epoch %d", stage.name, position.epoch)
                resume = False
            else:
                position = Position(stage=index)
                self.standing = [s if s.failed else Standing(Progress(stage=index)) for s in self.standing]
            state = self._stage(stage, state, position)
            last = index == len(self.method.stages) - 1
            for r, replica in enumerate(self.replicas):
                fit = self._fit(stage, state, r)
                if not last:
                    starts[r] = (fit.params, fit.extra, starts[r][2])
                elif not self.standing[r].failed:
                    done(replica, fit)

    def _fit(self, stage: Stage, state: TrainState, r: int) -> Fit:
        replica, progress = self.replicas[r], self.standing[r].progress
        own = jax.device_get(
            jax.tree.map(lambda leaf: leaf[r], state.replace(opt_state=None, rng=None, totals={}, step=None))
        )
        params = selected_params(replica.job.cfg, stage, own, progress)
        extra = selected_extra(replica.job.cfg, own, progress)
        return Fit(params, extra, progress, replica.job.data.train.plan.fill())

    def _stage(self, stage: Stage, state: TrainState, position: Position) -> TrainState:
        streams = _Streams(self.feeder, [data.train for data in self.data])
        longest, epochs = int(self.steps.max()), self.cfg.train.max_epochs
        title = self.title or f"{len(self.replicas)} replicas, {stage.name}"
        initial = position.epoch * longest + position.step
        # disable=None: no bar when the output is not a terminal.
        with tqdm(total=epochs * longest, initial=initial, desc=title, unit="step", disable=None) as bar:
            while position.epoch < epochs and self.running.any():
                streams.drop({self.stream_of[r] for r in np.flatnonzero(self.running)})
                state, timing = self._epoch_steps(stage, state, position, streams, bar)
                position = dataclasses.replace(position, epoch=position.epoch + 1, step=0)
                state = self._end_epoch(stage, state, position, timing, bar)
        return state

    def _epoch_steps(self, stage, state, position, streams, bar):
        running, loss = self.running, None
        rates = self._rates(position.epoch)
        began, waited = time.perf_counter(), 0.0
        patches, sent, taken = (np.zeros(len(self.replicas), np.int64) for _ in range(3))
        bar.set_postfix({"active": f"{running.sum()}/{len(running)}"})
        for step in range(position.step, int(self.steps[running].max())):
            active = running & (step < self.steps)
            asked = time.perf_counter()
            fresh = streams.advance(
                {self.stream_of[r]: int(position.epoch * self.steps[r] + step) for r in np.flatnonzero(active)}
            )
            batches = self._stacked(streams.latest)
            waited += time.perf_counter() - asked
            # At most one step in flight, as in a single run.
            jax.block_until_ready(loss)
            state, loss = self.programs.train(stage, state, batches, rates[:, step], self.values, active)
            for r in np.flatnonzero(active):
                fed = fresh[self.stream_of[r]]
                patches[r], sent[r], taken[r] = patches[r] + fed.patches, sent[r] + fed.host_bytes, taken[r] + 1
                self._move(r, step=self.standing[r].progress.step + 1)
            bar.update()
            if self.stop.requested:
                self._interrupt(state, dataclasses.replace(position, step=step + 1))
        jax.block_until_ready(loss)
        seconds = time.perf_counter() - began
        shared = {"time_epoch": seconds, "time_data_wait": waited, "active_replicas": int(running.sum())}
        return state, {
            r: {
                "lr": float(rates[r, self.steps[r] - 1]),
                **shared,
                "patches_per_second": patches[r] / seconds,
                "host_bytes_per_step": sent[r] / max(taken[r], 1),
            }
            for r in np.flatnonzero(running)
        }

    def _stacked(self, fed: Mapping[int, Fed]) -> dict[str, jax.Array]:
        """The seam to the device: one stacked batch out of those of the streams."""
        batches = {stream: one.batch for stream, one in fed.items()}
        return stack_batches(self.programs.layout, self.programs.mesh, batches)

    def _prepared(self, starts: list[tuple[Any, Any, Any]]) -> list[tuple[Any, Any, Any]]:
        """Initial parameters after the preparation of the method, done once for replicas of equal seed and data."""
        done: dict[tuple[int, int], tuple[Any, Any]] = {}
        for r, (params, extra, _) in enumerate(starts):
            job, key = self.replicas[r].job, (self.replicas[r].job.cfg.seed, self.stream_of[r])
            if key not in done:
                done[key] = preparation.prepare(self.method, job.cfg, job.data.train, self.feeder, params, extra)
        keys = ((r.job.cfg.seed, stream) for r, stream in zip(self.replicas, self.stream_of))
        return [(*done[key], rng) for key, (_, _, rng) in zip(keys, starts)]

    def _rates(self, epoch: int) -> np.ndarray:
        """[R, longest epoch] float32 learning rates; the last one is repeated where an epoch is shorter."""
        longest = int(self.steps.max())
        progress = [dataclasses.replace(standing.progress, epoch=epoch) for standing in self.standing]
        own = [p.rates(r.job.cfg, int(n)) for p, r, n in zip(progress, self.replicas, self.steps)]
        return np.array([np.pad(rates, (0, longest - len(rates)), mode="edge") for rates in own], np.float32)

    def _move(self, r: int, **changes: Any) -> None:
        progress = dataclasses.replace(self.standing[r].progress, **changes)
        self.standing[r] = dataclasses.replace(self.standing[r], progress=progress)

    def _save(self, state: TrainState, position: Position) -> None:
        # A number that grows with the group, which may hold folds of different lengths.
        longest = int(self.steps.max())
        number = (position.stage * self.cfg.train.max_epochs + position.epoch) * longest + position.step
        facts = {
            "position": dataclasses.asdict(position),
            "replicas": [s.to_json() for s in self.standing],
        }
        self.checkpoints.save(number, self.programs.trim(state), facts)

    def _interrupt(self, state: TrainState, position: Position) -> None:
        self._save(state, position)
        raise Interrupted(
            f"stopped by signal {self.stop.signal} in epoch {position.epoch} of {len(self.replicas)} replicas after "
            "writing a checkpoint; run the same command again to continue"
        )

    def _end_epoch(self, stage, state, position, timing, bar):
        epoch = position.epoch - 1
        facts = {"epoch": epoch, "stage": stage.name}
        was_running = self.running
        means = self._means(state, was_running)
        for r in np.flatnonzero(was_running):
            bad = sorted(name for name, value in means[r].items() if not np.isfinite(value))
            if bad:
                self._give_up(r, facts, f"{', '.join(bad)} became NaN or infinite")
            else:
                self.writers[r].write(self._global(r), {**facts, "split": "train"}, {**means[r], **timing[r]})
        improved, monitors = self._validate(stage, state, facts)
        for r in np.flatnonzero(was_running):
            self._move(r, epoch=epoch + 1)
        state = self.programs.close_epoch(state, improved)
        running = self.running
        shown = {
            "active": f"{running.sum()}/{len(running)}",
            "loss": f"{np.mean([m['loss'] for m in means.values()]):.3f}",
        }
        name = self.data[0].task.monitor_name
        bar.set_postfix(shown | ({name: f"{np.mean(monitors):.3f}"} if monitors else {}))
        last = position.epoch == self.cfg.train.max_epochs or not running.any()
        if last or position.epoch % self.cfg.ckpt.every_epochs == 0:
            self._save(state, position)
        return state

    def _global(self, r: int) -> int:
        return global_step(self.replicas[r].job, self.standing[r].progress)

    def _means(self, state: TrainState, running: np.ndarray) -> dict[int, dict[str, float]]:
        totals = jax.device_get(state.totals)
        return {
            r: {name: float(total[r]) / max(float(count[r]), 1.0) for name, (total, count) in totals.items()}
            for r in np.flatnonzero(running)
        }

    def _give_up(self, r: int, facts: Mapping[str, Any], what: str) -> None:
        """Freezes one replica; the others go on."""
        replica = self.replicas[r]
        reason = (
            f"stage {facts['stage']}, epoch {facts['epoch']}: {what}; lower train.lr, clip the genes (genes.clip=5), "
            "or check the data"
        )
        logging.error("%s diverged and was stopped: %s", replica.name, reason)
        self.standing[r] = dataclasses.replace(self.standing[r], failed=reason)
        with atomic_writer(replica.job.directory / FAILED_FILE) as stream:
            record = {"identity": dict(replica.job.identity), "replica": replica.name, "reason": reason, **facts}
            json.dump(record, stream, indent=2, sort_keys=True)

    def _validate(self, stage, state, facts) -> tuple[np.ndarray, list[float]]:
        """([R] which improved, the monitors of the running ones); writes the metrics of every running replica."""
        improved, monitors = np.zeros(len(self.replicas), bool), []
        if "val" not in self.data[0].evaluation:
            return improved, monitors
        for r, found in self._predict(state, "val").items():
            if not evaluate.is_finite(found):
                self._give_up(r, facts, "predictions became NaN or infinite")
                continue
            data = self.replicas[r].job.data
            metrics = data.task.val_metrics(found, data.answers("val"))
            monitor = data.task.monitor(metrics, stage.monitor_modes)
            self.writers[r].write(self._global(r), {**facts, "split": "val"}, {**metrics, "monitor": monitor})
            job, before = self.replicas[r].job, self.standing[r].progress
            after, improved[r] = before.monitored(job.cfg, monitor, facts["epoch"])
            self._move(r, stopper=after.stopper, plateau=after.plateau)
            monitors.append(monitor)
        return improved, monitors

    def _predict(self, state: TrainState, part: str) -> dict[int, dict[str, dict[str, np.ndarray]]]:
        """Running replica -> mode -> output -> [n, ...] of its own validation or test samples."""
        rows = np.flatnonzero(self.running)
        keys = self._dropout_keys(state)
        sources = {self.stream_of[r]: self.data[self.stream_of[r]].evaluation[part] for r in rows}
        passes = {stream: iter(self.feeder.evaluate(source)) for stream, source in sources.items()}
        found = {r: evaluate.Collected(sources[self.stream_of[r]]) for r in rows}
        latest: dict[int, Fed] = {}
        number = 0
        while True:
            fresh = {stream: fed for stream, it in passes.items() if (fed := next(it, None)) is not None}
            if not fresh:
                # Tables start with the deployed mode; a jitted function returns dictionaries in the order of keys.
                return {r: {mode: one.values[mode] for mode in self.modes} for r, one in found.items()}
            latest |= fresh
            active = np.zeros(len(self.replicas), bool)
            active[[r for r in rows if self.stream_of[r] in fresh]] = True
            step_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            values = jax.device_get(self.programs.predict(self.modes, state, self._stacked(latest), active, step_keys))
            for r in np.flatnonzero(active):
                own = jax.tree.map(lambda value, r=r: value[r], values)
                found[r].add(fresh[self.stream_of[r]].slide_index, own)
            number += 1

    def _dropout_keys(self, state: TrainState) -> jax.Array | None:
        """[R] keys of the teachers' dropout in validation, as a single run draws them."""
        if not self.cfg.eval.teacher_dropout:
            return None
        steps = jax.device_get(state.step)
        return jnp.stack(
            [jax.random.fold_in(jax.random.key(r.job.cfg.seed), int(k)) for r, k in zip(self.replicas, steps)]
        )
