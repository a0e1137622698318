"""A whole run: folds of the distilled arm and of its control, with everything a run directory holds.

    RUN/config.json  run_manifest.json  predictions_{val,test}.csv  summary.json  report.html
    RUN/fold_K/metrics.jsonl  tensorboard/  checkpoints/  model/  predictions_{val,test}.csv  fold.json
    RUN/fold_K/encoder/   of methods that train an image encoder; findings.json: what it noticed about itself
    RUN/control/...   the same networks with every distillation weight at 0, for the paired comparison

A fold with fold.json is finished and is not trained again; any other continues from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from data_pipelines.atomic import storage_errors
from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.methods import registry
from histokd_jax.tasks import Table, get_task
from histokd_jax.train import (
    data_kinds,
    distributed,
    encoder_folders,
    frozen_models,
    gene_choice,
    loop,
    model_dir,
    optim,
    provenance,
    sharding,
)
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.train.experiment import Experiment, FoldData
from histokd_jax.train.feed import Feeder
from histokd_jax.train.programs import Programs
from histokd_jax.train.resident import CohortCache
from histokd_jax.train.run_summary import write_summary, write_thresholded
from histokd_jax.train.signals import StopRequest
from histokd_jax.types import Method
from histokd_jax.utils import config as config_utils


def train(cfg: ConfigDict, workdir: pathlib.Path, command: Sequence[str] = ()) -> dict[str, Any]:
    """Trains every requested fold of both arms and writes the run directory (all but report.html).

    Args:
      cfg: resolved configuration.
      workdir: run directory; a run that was interrupted there is continued.
      command: the command line, for the run manifest.

    Returns:
      The summary of the distilled arm, as in summary.json.

    Raises:
      ValueError: contradictory configuration or bad data.
      Interrupted: a signal arrived; checkpoints were written.
    """
    kind = data_kinds.training(cfg)
    cfg = sharding.resolve_mesh(kind.resolve(cfg))
    check_method(cfg)
    distributed.check_agreement(provenance.host_facts(cfg), "configuration, data or versions")
    experiment = kind.load_experiment(cfg)
    numbers = fold_numbers(cfg.fold, len(experiment.folds))
    with storage_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    cohorts = CohortCache()
    with StopRequest() if distributed.is_alone() else distributed.AgreedStop() as stop:
        result = train_arm(experiment, numbers, workdir, command, stop, "student + distillation", cohorts)
        control = control_config(cfg)
        if control is not None:
            other = dataclasses.replace(experiment, cfg=control)
            train_arm(other, numbers, workdir / "control", command, stop, "control (all weights 0)", cohorts)
    return result


def check_method(cfg: ConfigDict) -> None:
    """Refuses a configuration that its method cannot train.

    Raises:
      ValueError: contradictory settings, an unknown optimizer or schedule, or a kind of task that the method does not
        know (`TASKS` of its module).
    """
    module = registry.method_module(cfg.method)
    kind = get_task(cfg).kind
    if kind not in getattr(module, "TASKS", (kind,)):
        raise ValueError(f"method {cfg.method} knows {', '.join(module.TASKS)}, not task_kind={kind}")
    module.validate(cfg)
    optim.check(cfg.train)


def control_config(cfg: ConfigDict) -> ConfigDict | None:
    """The same configuration with every distillation weight at 0, or None if it is one itself or not wanted.

    Weights are the keys loss.lambda_*, and those that the module of the method names in `CONTROL` (key -> value).
    """
    flat = config_utils.flatten(cfg)
    weights = {key: 0.0 for key, value in flat.items() if key.startswith("loss.lambda_") and value}
    own = getattr(registry.method_module(cfg.method), "CONTROL", {})
    weights |= {key: value for key, value in own.items() if flat[key] != value}
    if not cfg.compare.control or not weights:
        return None
    control = ConfigDict(cfg.to_dict())
    control.update_from_flattened_dict({**weights, "compare.control": False})
    return control.lock()


def fold_numbers(text: str, count: int) -> list[int]:
    """ "all" or one fold number, checked against the splits.

    Raises:
      ValueError: a number that is no fold.
    """
    if text == "all":
        return list(range(count))
    if not str(text).isdigit() or int(text) >= count:
        raise ValueError(f"fold={text}: the splits have folds 0 to {count - 1} (or give fold=all)")
    return [int(text)]


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """One run directory: the folds of one configuration.

    Attributes:
      experiment: data set, cohort, splits and configuration.
      folds: fold number -> planned data.
      directory: the run directory.
      facts: run_manifest.json.
      title: shown on progress bars.
    """

    experiment: Experiment
    folds: Mapping[int, FoldData]
    directory: pathlib.Path
    facts: Mapping[str, Any]
    title: str

    def job(self, fold: int, programs: Programs, feeder: Feeder) -> loop.Job:
        """The training of one fold."""
        cfg, data = self.experiment.cfg, self.folds[fold]
        spec = self.experiment.data_spec(_fields(cfg), fold)
        frozen, starts = frozen_models.read(cfg, spec, fold), encoder_folders.read_starts(cfg, spec)
        return loop.Job(
            cfg=cfg,
            programs=programs,
            feeder=feeder,
            cohort=self.experiment.cohort,
            data=data,
            fold=fold,
            directory=self.directory / f"fold_{fold}",
            identity={**identity(cfg, data), **feeder.identity, **frozen.identity, **starts.identity},
            title=f"{cfg.task} {self.title}, fold {fold}",
            frozen=frozen.groups,
            starts=starts,
        )

    def ready(self, job: loop.Job) -> loop.Job:
        """The same training with its frozen networks, or their outputs, on every device."""
        cfg, data = self.experiment.cfg, job.data
        groups = frozen_models.precompute(
            cfg,
            self.experiment.data_spec(_fields(cfg), job.fold),
            job.frozen,
            lambda: data_kinds.training(cfg).training_pass(self.experiment, data),
            len(self.experiment.cohort),
        )
        return dataclasses.replace(job, frozen=job.programs.whole(groups))


def make_method(experiment: Experiment, fold: int = 0) -> Method:
    """The method that an experiment's configuration asks for, with the networks of a fold."""
    return make_methods(experiment, [fold])[fold]


def make_methods(experiment: Experiment, folds: Sequence[int]) -> dict[int, Method]:
    """Fold -> its method: the same object for all folds, unless they choose genes of their own number."""
    cfg, found = experiment.cfg, {}
    varies = gene_choice.varies_by_fold(cfg)
    spec_of = {k: experiment.data_spec(_fields(cfg), k if varies else 0) for k in folds}
    for spec in spec_of.values():
        if spec not in found:
            found[spec] = registry.get_method(cfg.method)(cfg, spec)
    return {k: found[spec] for k, spec in spec_of.items()}


def make_programs(experiment: Experiment, method: Method) -> Programs:
    """The compiled steps of a run, on its mesh."""
    return Programs(method, experiment.cfg, sharding.make_mesh(experiment.cfg.mesh.data, experiment.cfg.mesh.sequence))


def build(experiment: Experiment, folds: Sequence[int]) -> dict[int, Programs]:
    """Fold -> its method and compiled steps (one object for all folds of one method). Runs that differ only in their
    seed may share them, so that nothing is traced or compiled again."""
    methods = make_methods(experiment, folds)
    programs = {id(method): make_programs(experiment, method) for method in methods.values()}
    return {k: programs[id(method)] for k, method in methods.items()}


def open_arm(
    experiment: Experiment,
    folds: Mapping[int, FoldData],
    directory: pathlib.Path,
    command: Sequence[str],
    title: str,
    source: Mapping[str, Any],
) -> Arm:
    """Claims a run directory and writes its config.json and run_manifest.json.

    Args:
      experiment: data set, cohort, splits and configuration.
      folds: fold number -> planned data.
      directory: the run directory.
      command: the command line.
      title: shown on progress bars.
      source: how the patches reach the devices (`Feeder.report`).

    Raises:
      CheckpointMismatchError: the directory holds a run with another configuration.
    """
    _claim(directory, experiment.cfg)
    identities = {
        f"fold {k}, {name}": value
        for k, data in folds.items()
        for name, value in identity(experiment.cfg, data).items()
    }
    distributed.check_agreement(identities, "what they train on")
    facts = {**provenance.run_manifest(experiment, folds, command), "input": dict(source)}
    _write_json(directory / "run_manifest.json", facts)
    return Arm(experiment, folds, directory, facts, title)


def close_arm(arm: Arm) -> dict[str, Any]:
    """Joins the predictions of all folds, which must be finished, and writes the summary."""
    task = arm.experiment.task
    tables: dict[str, list[Table]] = {}
    for k, data in arm.folds.items():
        # Always read back, so that a run finished in several sittings reports the same digits.
        for part in data.evaluation:
            path = arm.directory / f"fold_{k}" / f"predictions_{part}.csv"
            tables.setdefault(part, []).append(task.read_table(path))
    joined = {part: task.concatenate(found) for part, found in tables.items()}
    for part, table in joined.items() if distributed.is_main() else ():
        task.write_table(arm.directory / f"predictions_{part}.csv", table)
    write_thresholded(arm.directory, arm.experiment.cfg, joined)
    return write_summary(arm.directory, task, joined["test"], arm.experiment.cfg, arm.facts)


def train_arm(
    experiment: Experiment,
    numbers: Sequence[int],
    directory: pathlib.Path,
    command: Sequence[str],
    stop: StopRequest,
    title: str,
    cohorts: CohortCache,
    built: Mapping[int, Programs] | None = None,
) -> dict[str, Any]:
    """Trains the folds of one run directory that are not finished, and writes its summary.

    Args:
      experiment: data set, cohort, splits and resolved configuration.
      numbers: folds to train.
      directory: the run directory.
      command: the command line.
      stop: request to stop.
      title: shown on progress bars.
      cohorts: cohorts in device memory, kept between arms.
      built: from `build` for the same configuration but for its seed; None: built here.

    Returns:
      The summary.

    Raises:
      Interrupted: a signal arrived; a checkpoint was written.
      DivergedError: a loss became NaN or infinite.
    """
    cfg, kind = experiment.cfg, data_kinds.training(experiment.cfg)
    programs = build(experiment, numbers) if built is None else built
    planned = kind.share_shapes([kind.fold_data(experiment, k, programs[k].method) for k in numbers])
    mesh = programs[numbers[0]].mesh
    for data in planned:
        kind.check_mesh(mesh, cfg, data)
    sources = [source for data in planned for source in (data.train, *data.evaluation.values())]
    feeder = kind.make_feeder(cfg, mesh, sources, cohorts)
    arm = open_arm(experiment, dict(zip(numbers, planned)), directory, command, title, feeder.report())
    for k in numbers:
        job = arm.job(k, programs[k], feeder)
        if not is_finished(job):
            finish_fold(job, experiment, loop.fit(arm.ready(job), stop))
    return close_arm(arm)


def _fields(cfg: ConfigDict) -> tuple[str, ...]:
    return ("genes",) if "genes" in cfg else ()


def _claim(directory: pathlib.Path, cfg: ConfigDict) -> None:
    """Writes config.json, or refuses a folder that belongs to another configuration."""
    path = directory / "config.json"
    text = config_utils.to_json(cfg)
    # Read by one process: the others might already see what it writes.
    there = distributed.broadcast(path.read_text() if path.exists() else None)
    if there is not None:
        old = config_utils.identity(config_utils.from_json(there))
        new = config_utils.identity(config_utils.from_json(text))
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            raise CheckpointMismatchError(
                f"{directory.name} holds a run with another configuration: "
                + ", ".join(f"{k} ({old.get(k)!r} there, {new.get(k)!r} now)" for k in changed)
                + "; use the old settings to continue it, or another --workdir"
            )
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        with atomic_writer(path) as stream:
            stream.write(text)


def identity(cfg: ConfigDict, data: FoldData) -> dict[str, str]:
    """What must be equal to continue a fold: method, configuration and input."""
    return {
        "method": cfg.method,
        "config": config_utils.fingerprint(cfg),
        "input (data set, tables, splits or packing)": data.train.fingerprint(),
    }


def finish_fold(job: loop.Job, experiment: Experiment, result: loop.Fit) -> None:
    """Exports the model of a trained fold, writes its predictions and, last, fold.json, which marks it finished."""
    model_dir.export(job.directory / "model", result.params, experiment, job.data, job.fold, result.extra)
    _write_encoders(job, experiment, result)
    if distributed.is_main():
        job.data.task.write_reference(job.directory, experiment.cohort, job.data.split.train)
        if job.data.clusters is not None:
            job.data.clusters.write_ids(job.directory, experiment.reader)
    for part in job.data.evaluation:
        table = loop.predictions(job, part, result)
        if distributed.is_main():
            job.data.task.write_table(job.directory / f"predictions_{part}.csv", table)
    _write_json(
        job.directory / "fold.json",
        {
            "identity": dict(job.identity),
            "progress": result.progress.to_json(),
            "fill": result.fill,
            "split_hash": job.data.split_hash,
            "traces": job.programs.traces,
        },
    )
    distributed.barrier("fold finished")
    logging.info("fold %d finished: best epoch %d", job.fold, result.progress.stopper.best_epoch)


def _write_encoders(job: loop.Job, experiment: Experiment, result: loop.Fit) -> None:
    """The image encoders that were trained, as folders that `histokd embed --weights` reads."""
    spec = experiment.data_spec(_fields(job.cfg), job.fold)
    if not encoder_folders.of_method(job.cfg, spec):
        return
    params, extra = job.programs.whole(result.params), job.programs.whole(result.extra)
    if distributed.is_main():
        facts = {"config": json.loads(config_utils.to_json(job.cfg)), "split_hash": job.data.split_hash}
        encoder_folders.write(job.directory, job.cfg, spec, params, extra, experiment.manifest, fold=job.fold, **facts)


def is_finished(job: loop.Job) -> bool:
    """Whether the fold was completed earlier; refuses one that was completed with other inputs."""
    path = job.directory / "fold.json"
    text = distributed.broadcast(path.read_text() if path.exists() else None)
    if text is None:
        return False
    saved = json.loads(text)["identity"]
    if saved != dict(job.identity):
        changed = sorted(k for k in {*saved, *job.identity} if saved.get(k) != job.identity.get(k))
        raise CheckpointMismatchError(
            f"{job.directory.name} was finished with another {', '.join(changed)}; give another --workdir"
        )
    return True


def _write_json(path: pathlib.Path, value: Any) -> None:
    if not distributed.is_main():
        return
    with atomic_writer(path) as stream:
        json.dump(value, stream, indent=2, sort_keys=True)
