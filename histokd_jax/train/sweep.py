"""A whole sweep: settings x seeds x folds, trained group by group as one program each, and one table.

    SWEEP/SETTING/seed_N/...      a run directory of its own, as `histokd train` writes it
    SWEEP/SETTING/seed_N/fold_K/failed.json   a training that diverged; the others go on
    SWEEP/groups/N/               checkpoints of a group while it is trained, removed when it is done
    SWEEP/table.{md,csv,json}     every setting over seeds and folds, and its difference to the reference

What is finished is not trained again, so the same command continues an interrupted sweep, and a larger one (more seeds
or settings) adds to it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from data_pipelines.atomic import storage_errors
from histokd_jax.evals import ablation, summary
from histokd_jax.evals.predictions import atomic_writer
from histokd_jax.tasks import Table
from histokd_jax.train import (
    data_kinds,
    distributed,
    gene_choice,
    one_by_one,
    provenance,
    replica_step,
    replicas,
    run,
    sharding,
)
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.train.experiment import Experiment, FoldData, fold_data
from histokd_jax.train.feed import Feeder, StreamFeeder
from histokd_jax.train.loop import Fit, Job
from histokd_jax.train.replica_loop import Replica, failure, fit_group
from histokd_jax.train.run_summary import resampling
from histokd_jax.train.signals import StopRequest
from histokd_jax.train.widths import Widths
from histokd_jax.types import Method
from histokd_jax.utils import config as config_utils

GROUPS = "groups"
MEMBERS_FILE = "members.json"


@dataclasses.dataclass(frozen=True, order=True)
class Member:
    """One training of a sweep; ordered so that trainings on the same data lie next to each other."""

    seed: int
    fold: int
    setting: str

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}, fold {self.fold}"


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """A checked sweep.

    Attributes:
      experiments: setting -> its data and configuration (seed as configured).
      methods: setting -> its method.
      reference: the setting that the others are compared with.
      seeds: seeds of every setting.
      folds: fold numbers of every setting.
      groups: settings that share a program.
    """

    experiments: Mapping[str, Experiment]
    methods: Mapping[str, Method]
    reference: str
    seeds: tuple[int, ...]
    folds: tuple[int, ...]
    groups: tuple[replicas.Group, ...]

    def members(self, group: replicas.Group) -> list[Member]:
        """All trainings of a group."""
        return sorted(Member(s, k, name) for name in group.settings for s in self.seeds for k in self.folds)

    def describe(self) -> str:
        """The groups, for the log and for --dry-run."""
        total = sum(len(self.members(group)) for group in self.groups)
        lines = [
            f"{len(self.experiments)} settings x {len(self.seeds)} seeds x {len(self.folds)} folds = {total} trainings "
            f"in {len(self.groups)} groups that share a program:"
        ]
        for number, group in enumerate(self.groups):
            varying = f"; as data: {', '.join(group.varying)}" if group.varying else ""
            if gene_choice.varies_by_fold(self.experiments[group.settings[0]].cfg):
                varying += "; one program for every choice of sizes of the gene groups"
            lines.append(
                f"  group {number}: {len(self.members(group))} replicas of {', '.join(group.settings)}{varying}"
            )
        return "\n".join(lines)


def prepare(settings: Mapping[str, ConfigDict], reference: str, seeds: Sequence[int]) -> Sweep:
    """Checks every setting against the data, before anything is trained, and groups them.

    Args:
      settings: name -> locked configuration.
      reference: one of them.
      seeds: distinct seeds; they replace `seed` of the configuration.

    Raises:
      ValueError: contradictory configuration or bad data, naming the setting.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"seeds {list(seeds)}: give at least one, each once")
    experiments, loaded = {}, {}
    for name, cfg in settings.items():
        kind = data_kinds.training(cfg)
        cfg = _plain(kind.resolve(cfg), cfg.seed)
        mesh = sharding.make_replica_mesh(cfg.mesh.replica)
        replica_step.resolve_loop(cfg.train.replica_loop, mesh.devices.flat[0].platform)
        if cfg.mesh.data != 1:
            raise ValueError(
                f"mesh.data={cfg.mesh.data}: a sweep divides whole trainings, not rows; set mesh.data=1, mesh.replica=N"
            )
        try:
            run.check_method(cfg)
            key = _data_key(cfg)
            if key not in loaded:
                loaded[key] = kind.load_experiment(cfg)
        except ValueError as error:
            raise ValueError(f"setting {name}: {error}") from error
        experiments[name] = dataclasses.replace(loaded[key], cfg=cfg)
    first = experiments[reference]
    folds = tuple(run.fold_numbers(first.cfg.fold, len(first.folds)))
    methods = {name: _checked_method(name, experiment, folds) for name, experiment in experiments.items()}
    if stacked(first.cfg):
        groups = replicas.group_settings({name: e.cfg for name, e in experiments.items()}, methods)
    else:
        groups = [replicas.Group((name,), (), ()) for name in experiments]
    sweep = Sweep(experiments, methods, reference, tuple(seeds), folds, tuple(groups))
    for group in groups:
        for name in _distinct_data(group, experiments):
            try:
                data_kinds.training(first.cfg).fold_data(experiments[name], folds[0], methods[name])
            except ValueError as error:
                raise ValueError(f"setting {name}: {error}") from error
    return sweep


def stacked(cfg: ConfigDict) -> bool:
    """Whether trainings on this kind of data are stacked into one program; others run one after the other."""
    return data_kinds.kind_of(cfg) == data_kinds.BAGS


def train(sweep: Sweep, workdir: pathlib.Path, command: Sequence[str] = (), most: int = 0) -> dict[str, Any]:
    """Trains what is not finished, group by group, and writes the table.

    Args:
      sweep: from `prepare`.
      workdir: the sweep's directory.
      command: the command line, for the run manifests.
      most: most replicas of one program; 0: as many as fit into memory.

    Returns:
      The contents of table.json; "failed" names the trainings that diverged.

    Raises:
      ValueError: bad data, or a directory that holds another sweep.
      Interrupted: a signal arrived; a checkpoint was written.
    """
    with storage_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    distributed.tell(sweep.describe())
    failed: dict[str, str] = {}
    with StopRequest() as stop:
        if not stacked(sweep.experiments[sweep.reference].cfg):
            experiments = {(name, seed): e for name, e in sweep.experiments.items() for seed in sweep.seeds}
            failed = one_by_one.train_settings(
                experiments,
                _plain,
                lambda name, seed: _arm_directory(workdir / name, seed),
                sweep.folds,
                command,
                stop,
            )
            return write_table(sweep, workdir, failed)
        for number, group in enumerate(sweep.groups):
            failed |= _Trainer(sweep, group, workdir, command, stop, most, f"group {number}").run()
    return write_table(sweep, workdir, failed)


def write_table(sweep: Sweep, workdir: pathlib.Path, failed: Mapping[str, str]) -> dict[str, Any]:
    """Compares all settings on what they predicted; writes table.md, table.csv and table.json."""
    first = sweep.experiments[sweep.reference]
    cfg, manifest = first.cfg, first.manifest
    options = resampling(cfg)
    runs = {name: _predictions(sweep, workdir / name) for name in sweep.experiments}
    if not runs[sweep.reference]:
        raise ValueError(
            f"no training of the reference setting {sweep.reference} succeeded, so there is no table; failed: "
            + "; ".join(f"{name} ({why})" for name, why in failed.items())
        )
    measure = first.task.measure()
    table = ablation.ablation_table(runs, sweep.reference, measure=measure, **options)
    marks = [summary.SIMULATED[data_kinds.kind_of(cfg)]] if manifest.simulated else []
    marks += ["within one patient, across sections"] if any(s.patient_overlap for s in first.folds) else []
    marks += [mark for mark in _marks_of_runs(sweep, workdir) if mark not in marks]
    facts = {
        "title": f"Ablations of {cfg.method}, {cfg.task}, {manifest.name}",
        "marks": marks,
        "failed": dict(failed),
        "seeds": list(sweep.seeds),
        "folds": list(sweep.folds),
        "groups": [list(group.settings) for group in sweep.groups],
        "data_fingerprint": manifest.fingerprint(),
        "versions": provenance.versions(),
        "git": provenance.git_revision(),
    }
    ablation.write_table(workdir, table, facts, measure.labels)
    return {**facts, **table}


def _marks_of_runs(sweep: Sweep, workdir: pathlib.Path) -> list[str]:
    """What must be said beside the numbers of any run of the sweep, e.g. a teacher that saw test patients."""
    manifests = [
        _arm_directory(workdir / name, seed) / "run_manifest.json" for name in sweep.experiments for seed in sweep.seeds
    ]
    found = [json.loads(path.read_text()).get("marks", ()) for path in manifests if path.exists()]
    return list(dict.fromkeys(mark for marks in found for mark in marks))


def _predictions(sweep: Sweep, directory: pathlib.Path) -> dict[tuple[int, int], Table]:
    found, task = {}, sweep.experiments[sweep.reference].task
    for seed in sweep.seeds:
        for fold in sweep.folds:
            path = _arm_directory(directory, seed) / f"fold_{fold}"
            if (path / "fold.json").exists():
                found[seed, fold] = task.read_table(path / "predictions_test.csv")
    return found


def _arm_directory(directory: pathlib.Path, seed: int) -> pathlib.Path:
    return directory / f"seed_{seed}"


def _plain(cfg: ConfigDict, seed: int) -> ConfigDict:
    """A setting with its seed; the sweep compares settings, so no setting trains a control of its own."""
    own = ConfigDict(cfg.to_dict())
    own.update_from_flattened_dict({"seed": seed, "compare.control": False})
    return own.lock()


def _data_key(cfg: ConfigDict) -> str:
    """What `load_experiment` reads, so that settings with the same data open it once."""
    read = ("data", "split", "task", "task_kind", "survival", "labels", "variant")
    facts = {name: cfg.to_dict().get(name) for name in read}
    genes = [gene_choice.kind_of(cfg), gene_choice.reads_genes(cfg)]
    return json.dumps([facts, genes], sort_keys=True, default=str)


def _checked_method(name: str, experiment: Experiment, folds: Sequence[int]) -> Method:
    """The method of a setting, with the networks of its first fold; those of all folds can be built."""
    try:
        if not gene_choice.varies_by_fold(experiment.cfg):
            return run.make_method(experiment)
        return run.make_methods(experiment, folds)[folds[0]]
    except ValueError as error:
        raise ValueError(f"setting {name}: {error}") from error


def _distinct_data(group: replicas.Group, experiments: Mapping[str, Experiment]) -> list[str]:
    """One setting for every choice of data within a group."""
    return list({_contents(experiments[name].cfg): name for name in reversed(group.settings)}.values())


def _contents(cfg: ConfigDict) -> str:
    flat = config_utils.flatten(cfg)
    return json.dumps([flat.get(key) for key in replicas.DATA_KEYS], default=str)


class _Trainer:
    """Trains one group in as many parts as memory asks for."""

    def __init__(self, sweep, group, workdir, command, stop, most, title):
        self.sweep, self.group, self.workdir = sweep, group, workdir
        self.command, self.stop, self.most, self.title = command, stop, most, title
        self.method: Method = sweep.methods[group.settings[0]]
        self.widths = Widths(sweep.experiments[group.settings[0]], self.method)
        self._plans: dict[tuple[int, int, str], FoldData] = {}

    def run(self) -> dict[str, str]:
        """Trains what is missing; returns the members that diverged, now or earlier, with the reason."""
        names = [(name, seed) for name in self.group.settings for seed in self.sweep.seeds]
        folds = {key: self._folds(*key) for key in names}
        first = self.sweep.experiments[self.group.settings[0]]
        if first.cfg.data.resident == "on":
            raise ValueError("data.resident=on: a sweep reads its patches from disk; set data.resident=off")
        # One stream per fold and seed reads ahead at the same time; the threads are shared among them.
        mesh = sharding.make_mesh(first.cfg.mesh.data, first.cfg.mesh.sequence)
        feeder = StreamFeeder(mesh, max(1, first.cfg.data.threads // max(1, len(self._plans))))
        arms = {key: self._arm(*key, folds[key], feeder) for key in names}
        jobs = {
            m: arms[m.setting, m.seed].job(m.fold, self.widths.programs(folds[m.setting, m.seed][m.fold]), feeder)
            for m in self.sweep.members(self.group)
        }
        failed = {m: why for m, job in jobs.items() if (why := failure(job))}
        todo = [m for m, job in jobs.items() if m not in failed and not run.is_finished(job)]
        for directory, part in self._parts(todo, jobs):
            failed |= self._fit(directory, part, jobs, arms)
        for (name, seed), arm in arms.items():
            lost = [str(m) for m in failed if (m.setting, m.seed) == (name, seed)]
            if lost:
                logging.warning("%s: no summary, because of %s", arm.directory.name, "; ".join(lost))
            else:
                run.close_arm(arm)
        return {str(m): why for m, why in failed.items()}

    def _experiment(self, name: str, seed: int) -> Experiment:
        found = self.sweep.experiments[name]
        return dataclasses.replace(found, cfg=_plain(found.cfg, seed))

    def _folds(self, name: str, seed: int) -> dict[int, FoldData]:
        experiment = self._experiment(name, seed)
        return {fold: self._plan(experiment, fold) for fold in self.sweep.folds}

    def _arm(self, name: str, seed: int, folds: dict[int, FoldData], feeder: Feeder) -> run.Arm:
        directory = _arm_directory(self.workdir / name, seed)
        experiment, title = self._experiment(name, seed), f"{name}, seed {seed}"
        return run.open_arm(experiment, folds, directory, self.command, title, feeder.report())

    def _plan(self, experiment: Experiment, fold: int) -> FoldData:
        """The same object for all settings that read the same batches."""
        key = (experiment.cfg.seed, fold, _contents(experiment.cfg))
        if key not in self._plans:
            self._plans[key] = fold_data(experiment, fold, self.method)
        return self._plans[key]

    def _parts(self, todo: Sequence[Member], jobs: Mapping[Member, Job]) -> list[tuple[pathlib.Path, list[Member]]]:
        """Interrupted parts as they were, then new ones of what they leave."""
        parts, left = [], list(todo)
        root = self.workdir / GROUPS
        for path in sorted(root.glob(f"*/{MEMBERS_FILE}")):
            members = [Member(**facts) for facts in json.loads(path.read_text())]
            if not any(m.setting in self.group.settings for m in members):
                continue
            absent = [str(m) for m in members if m not in jobs]
            if absent:
                raise CheckpointMismatchError(
                    f"{path.parent} was interrupted with trainings that this command does not ask for "
                    f"({'; '.join(absent[:3])}): give the settings and seeds it was started with, or remove the folder "
                    "to train its members anew"
                )
            parts.append((path.parent, members))
            left = [m for m in left if m not in members]
        # Trainings of networks of other widths cannot share a program.
        equal: dict[int, list[Member]] = {}
        for m in left:
            equal.setdefault(id(jobs[m].programs), []).append(m)
        new = [part for own in equal.values() for part in self._split(own, jobs)]
        return parts + [(self._new_directory(root, k), part) for k, part in enumerate(new)]

    @staticmethod
    def _new_directory(root: pathlib.Path, offset: int) -> pathlib.Path:
        used = [int(path.name) for path in root.glob("*") if path.name.isdigit()]
        return root / f"{max(used, default=-1) + 1 + offset:04d}"

    def _split(self, members: Sequence[Member], jobs: Mapping[Member, Job]) -> list[list[Member]]:
        job = jobs[members[0]]
        streams = [id(jobs[m].data) for m in members]
        sources = {id(jobs[m].data): jobs[m].data.train for m in members}.values()
        sizes = [replicas.memory_of(job.programs.method, job.cfg, source) for source in sources]
        state, step = (max(values) for values in zip(*sizes))
        # Every device holds its share of the replicas.
        budget = replicas.memory_budget() * sharding.make_replica_mesh(job.cfg.mesh.replica).size
        parts = replicas.split_to_fit(members, streams, state, step, budget, self.most)
        logging.info(
            "%s: %d trainings in %d parts; %.0f MiB per replica, %.0f MiB per stream of batches, %.0f MiB allowed",
            self.title,
            len(members),
            len(parts),
            state / 2**20,
            step / 2**20,
            budget / 2**20,
        )
        return parts

    def _fit(self, directory, part, jobs, arms) -> dict[Member, str]:
        with storage_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        with atomic_writer(directory / MEMBERS_FILE) as stream:
            json.dump([dataclasses.asdict(m) for m in part], stream)
        raw = list({id(jobs[m].data): jobs[m].data for m in part}.values())
        # Shapes are made equal within the part only; a fold is recognised by its own plan, which does not depend on it.
        aligned = dict(zip(map(id, raw), replicas.align(raw)))
        members = {str(m): m for m in part}
        group = [
            Replica(
                name=str(m),
                job=dataclasses.replace(jobs[m], data=aligned[id(jobs[m].data)]),
                values=self._values(jobs[m].cfg),
            )
            for m in part
        ]

        def done(replica: Replica, fit: Fit) -> None:
            member = members[replica.name]
            if not run.is_finished(replica.job):
                run.finish_fold(replica.job, arms[member.setting, member.seed].experiment, fit)

        failed = fit_group(group, directory, self.stop, done, f"{self.title}, {len(group)} replicas")
        shutil.rmtree(directory)
        return {members[name]: why for name, why in failed.items()}

    def _values(self, cfg: ConfigDict) -> dict[str, float]:
        flat = config_utils.flatten(cfg)
        return {key: float(flat[key]) for key in self.group.varying}
