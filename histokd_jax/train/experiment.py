"""From a configuration to what a fold trains on: data set, cohort, splits, genes, planned batches."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import packing, schema, windows
from data_pipelines.assembler import Reader
from data_pipelines.cohort import Cohort
from data_pipelines.genes import GeneTable
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import SlideTable, Source, StepSource
from data_pipelines.reader import BagReader
from data_pipelines.splits import CORRECTED, Split, make_folds, read_folds, split_fingerprint
from histokd_jax.tasks import Tables, Targets, Task, get_task
from histokd_jax.train import cluster_choice, gene_choice, teacher_table
from histokd_jax.train.feed import make_feeder
from histokd_jax.train.gene_choice import CNV, GENE_FIELDS, Selection
from histokd_jax.train.step_shapes import check_mesh, share_shapes
from histokd_jax.types import DataSpec, Method

__all__ = ["Experiment", "FoldData", "check_mesh", "check_selection", "check_width", "find_tables", "fold_data"]
__all__ += [
    "load_experiment",
    "make_feeder",
    "open_manifest",
    "resolve",
    "resolve_width",
    "share_shapes",
    "split_marks",
]

PUBLISHED_MARK = "reported part = validation part (published protocol)"


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that is fixed before the first fold trains.

    Attributes:
      cfg: the resolved configuration.
      manifest: of the data set.
      reader: reads the bags of the samples, by `cohort.bag_index`.
      cohort: the samples, joined with labels, genes and survival.
      gene_tables: batch field -> table aligned to the cohort ("genes", and "cnv" for two-stream variants).
      folds: splits of the cohort.
    """

    cfg: ConfigDict
    manifest: Manifest
    reader: Reader
    cohort: Cohort
    gene_tables: Mapping[str, GeneTable]
    folds: list[Split]

    @property
    def num_classes(self) -> int:
        """Classes or time bins of the task."""
        return len(self.cohort.class_names)

    @property
    def task(self) -> Task:
        """The kind of answer, not fitted to a fold."""
        return get_task(self.cfg)

    @property
    def marks(self) -> list[str]:
        """What the protocol demands to be said beside every number."""
        return split_marks(self.folds, self.cfg)

    def data_spec(self, method_fields: tuple[str, ...], fold: int = 0) -> DataSpec:
        """What the method must know about the data; `fold` matters where folds choose genes of their own number."""
        spec = DataSpec(self.manifest.feat_dim, self.num_classes, task=self.task.kind)
        if schema.GENES not in method_fields or not gene_choice.reads_genes(self.cfg):
            return spec
        if gene_choice.kind_of(self.cfg) == gene_choice.RANKED:
            return dataclasses.replace(spec, num_genes=self.cfg.genes.top_k)
        chosen = self.choose_genes(schema.GENES, fold)
        groups = gene_choice.group_sizes(chosen)
        return dataclasses.replace(spec, num_genes=len(chosen.names), gene_groups=groups)

    def choose_genes(self, field: str, fold: int) -> Selection:
        """The genes that a batch field holds in one fold."""
        split = self.folds[fold]
        targets = self.task.fit(self.cohort, split.train).targets(self.cohort)
        return gene_choice.choose(self.cfg, self.gene_tables[field], split, self.cohort, targets)


@dataclasses.dataclass(frozen=True, eq=False)
class FoldData:
    """What one fold trains and is evaluated on; of any kind of data (see `data_kinds`).

    Attributes:
      train: planned training batches.
      evaluation: "val" (absent without a validation part) and "test" -> planned exact passes.
      selections: batch field -> the genes chosen on this fold's training patients.
      split_hash: sha256 of the split.
      task: fitted to the fold.
      split: rows of the cohort in every part.
      targets: the answers of the whole cohort, as the fold's task sees them.
      clusters: of the patches, for methods that read them.
      marks: what must be said beside every number of the fold.
    """

    train: Source
    evaluation: Mapping[str, Source]
    selections: Mapping[str, Selection]
    split_hash: str
    task: Task
    split: Split
    targets: Targets
    clusters: cluster_choice.FoldClusters | None = None
    marks: tuple[str, ...] = ()

    def answers(self, part: str) -> Targets:
        """The answers of the samples of a part, in the order of its source."""
        rows = getattr(self.split, part)
        return {name: values[rows] for name, values in self.targets.items()}


def split_marks(folds: Sequence[Split], cfg: ConfigDict) -> list[str]:
    """What the protocol of the splits demands to be said beside every number."""
    if not any(split.val_is_test for split in folds):
        return []
    return [PUBLISHED_MARK + (", epoch selected on it" if cfg.early_stop.enabled else "")]


def open_manifest(directory: str) -> Manifest:
    """The manifest of a data set of this kind."""
    return Manifest.load(directory)


def load_experiment(cfg: ConfigDict) -> Experiment:
    """Opens the data set, joins the tables, makes or reads the splits.

    Raises:
      ValueError: anything that would make training wrong; names the file and the fix.
    """
    if not cfg.data.dir:
        raise ValueError("data.dir is empty: give the data set with --config.data.dir=DIRECTORY")
    manifest = Manifest.load(cfg.data.dir)
    check_width(manifest, cfg.data.feat_dim)
    task = get_task(cfg)
    tables = find_tables(cfg, manifest)
    if getattr(tables, task.answers) is None:
        file = f"tables/{task.answers}.csv"
        raise ValueError(f"no {file} in the data set and data.{task.answers} is not set ({manifest.directory})")
    needs_genes = gene_choice.reads_genes(cfg)
    if needs_genes and tables.genes is None:
        raise ValueError(
            f"data set {manifest.name} has no tables/genes.npz and data.genes is not set: the teachers need gene "
            "expression; give --config.data.genes=FILE"
        )
    cohort = task.open_cohort(
        manifest,
        cfg,
        tables if needs_genes else dataclasses.replace(tables, genes=None),
        **_label_policies(cfg),
        read_genes=lambda path: gene_choice.read_table(cfg, path),
    )
    found = {} if cohort.genes is None else {schema.GENES: cohort.genes}
    if cfg.get("variant") == "gmkdn":
        found[CNV] = gene_choice.read_copy_number(cfg.data.cnv, cohort)
    reader = cohort.open_bags(BagReader(manifest))
    return Experiment(cfg, manifest, reader, cohort, found, _folds(cfg, task, cohort))


def _label_policies(cfg: ConfigDict) -> dict[str, str]:
    """How cases without a clear label are read, see `data_pipelines.tables.read_labels`."""
    if "labels" not in cfg:
        return {"her2_equivocal": "drop"}
    missing = {"missing_labels": cfg.labels.missing} if "missing" in cfg.labels else {}
    return {"her2_equivocal": cfg.labels.her2_equivocal, **missing}


def resolve_width(cfg: ConfigDict) -> ConfigDict:
    """The configuration with data.feat_dim=0 replaced by the width of the data set, so that the record is explicit."""
    if cfg.data.feat_dim or not cfg.data.dir:
        return cfg
    resolved = ConfigDict(cfg.to_dict())
    resolved.data.feat_dim = Manifest.load(cfg.data.dir).feat_dim
    return resolved.lock()


resolve = resolve_width
"""What the configuration takes from the data set (see `data_kinds`)."""


def check_width(manifest: Manifest, expected: int) -> None:
    """Refuses a data set whose embeddings have another width than asked for.

    Raises:
      ValueError: naming both widths and the encoder of the data set.
    """
    if expected and manifest.feat_dim != expected:
        encoder = (manifest.encoder or {}).get("name", "unknown")
        raise ValueError(
            f"data set {manifest.name} holds {manifest.feat_dim}-d patches (encoder: {encoder}), the model expects "
            f"{expected}: wrong encoder? Set data.feat_dim={manifest.feat_dim} to train on these"
        )


def find_tables(cfg: ConfigDict, manifest: Manifest) -> Tables:
    """Files of labels, genes and survival: the configured ones, or the data set's own, or None."""
    own = {"labels": "labels.csv", "genes": "genes.npz", "survival": "survival.csv"}
    out = {}
    for name, file in own.items():
        given, default = cfg.data[name], pathlib.Path(manifest.directory) / "tables" / file
        out[name] = pathlib.Path(given) if given else (default if default.exists() else None)
    return Tables(**out)


def _folds(cfg: ConfigDict, task: Task, cohort: Cohort) -> list[Split]:
    options = {name: cfg.split[name] for name in ("val_fraction", "stratify", "seed")}
    options |= {"protocol": cfg.split.get("protocol", CORRECTED), "strata": task.strata(cohort)}
    if cfg.split.dir:
        overlap = cfg.data.allow_patient_overlap
        return read_folds(cfg.split.dir, cohort, allow_patient_overlap=overlap, **options)
    return make_folds(cohort, n_folds=cfg.split.n_folds, **options)


def fold_data(experiment: Experiment, fold: int, method: Method) -> FoldData:
    """Gene selection on training patients, slot tables, and the plan of every epoch.

    Raises:
      ValueError: a part whose metrics would be undefined, or as the planners.
    """
    cfg, cohort, split = experiment.cfg, experiment.cohort, experiment.folds[fold]
    check_selection(cfg, split, fold)
    k = neighbours_of(cfg, method.requires)
    split, marks = _with_edges(experiment, split, k)
    experiment.task.check_split(cohort, split, fold)
    task = experiment.task.fit(cohort, split.train)
    targets = task.targets(cohort)
    needed = [field for field in GENE_FIELDS if field in method.requires]
    _check_genes(experiment, method, needed)
    selections = {f: gene_choice.choose(cfg, experiment.gene_tables[f], split, cohort, targets) for f in needed}
    fields = dict(targets)
    for field, selection in selections.items():
        fields[field] = selection.apply_table(experiment.gene_tables[field])
    if needed:
        fields[schema.HAS_GENES] = cohort.has_genes
    if schema.TEACHER_HAZARDS in method.requires:
        teacher = teacher_table.read_teacher(cfg, cohort, split, fold, task.bins.edges)
        fields, marks = fields | teacher.fields, (*marks, *teacher.marks)
    train_plan = _train_plan(experiment, split, method, task.sampling_classes(targets)[split.train])
    clusters = _clusters(experiment, split) if schema.CLUSTERS in method.requires else None
    evaluation = {}
    for part in ("val", "test"):
        rows = getattr(split, part)
        if not len(rows):
            continue
        plan = packing.plan_evaluation(
            _sizes(experiment, rows),
            target_capacity=train_plan.capacity,
            num_slots=cfg.eval.slots,
            rows=_rows(cfg),
            multiple_of=cfg.data.row_multiple,
        )
        evaluation[part] = _source(experiment, rows, fields, plan, clusters, k)
    return FoldData(
        train=_source(experiment, split.train, fields, train_plan, clusters, k),
        evaluation=evaluation,
        selections=selections,
        split_hash=split_fingerprint(split, cohort),
        task=task,
        split=split,
        targets=targets,
        clusters=clusters,
        marks=marks,
    )


def neighbours_of(cfg: ConfigDict, fields: tuple[str, ...]) -> int:
    """Neighbours per patch in the batches of a method or mode that reads some fields; 0: no graph."""
    return int(cfg.graph.k) if schema.NEIGHBOURS in fields else 0


def _with_edges(experiment: Experiment, split: Split, k: int) -> tuple[Split, tuple[str, ...]]:
    """The split without test samples that have no graph, if eval.edgeless=skip; and what must be said about it."""
    if not k or experiment.cfg.eval.get("edgeless", "predict") != "skip":
        return split, ()
    kept = split.test[_sizes(experiment, split.test) > k]
    left_out = len(split.test) - len(kept)
    mark = (f"{left_out} test samples without a graph left out (eval.edgeless=skip)",) if left_out else ()
    return dataclasses.replace(split, test=kept), mark


def _rows(cfg: ConfigDict) -> int:
    return cfg.data.rows or max(cfg.mesh.data, 1)


def _clusters(experiment: Experiment, split: Split) -> cluster_choice.FoldClusters:
    bags, parts = experiment.cohort.bag_index, (split.train, split.val, split.test)
    rows = np.concatenate([bags[part] for part in parts])
    return cluster_choice.choose(experiment.cfg, experiment.reader, bags[split.train], rows)


def _source(
    experiment: Experiment,
    rows: np.ndarray,
    fields: Mapping[str, np.ndarray],
    plan: Any,
    clusters: cluster_choice.FoldClusters | None,
    neighbours: int,
) -> StepSource:
    table = SlideTable(experiment.cohort.bag_index[rows], {name: value[rows] for name, value in fields.items()})
    ids = None if clusters is None else clusters.ids
    dtype = experiment.manifest.dtype
    return StepSource(experiment.reader, table, plan, dtype=dtype, clusters=ids, neighbours=neighbours)


def _sizes(experiment: Experiment, rows: np.ndarray) -> np.ndarray:
    """[len(rows)] patches of some samples."""
    return experiment.reader.manifest.sizes[experiment.cohort.bag_index[rows]]


def _train_plan(experiment: Experiment, split: Split, method: Method, labels: np.ndarray) -> packing.PackPlan:
    cfg = experiment.cfg
    if not cfg.train.drop_last:
        raise ValueError("train.drop_last=False is not possible; keep it True (G-HANet chooses with train.remainder)")
    sizes = _sizes(experiment, split.train)
    options = packing.PlanOptions(
        epochs=cfg.train.max_epochs,
        seed=cfg.seed,
        sampler=cfg.train.sampler,
        rows=_rows(cfg),
        multiple_of=cfg.data.row_multiple,
        max_patches=cfg.data.max_patches_train,
        chunk_patches=experiment.manifest.chunk_patches,
    )
    if not method.batch_coupled:
        capacity = cfg.train.b * int(np.mean(sizes))
        return packing.plan_free(sizes, labels, options, capacity=max(capacity, int(sizes.max())))
    return packing.plan_coupled(
        sizes,
        labels,
        options,
        slides_per_step=cfg.train.b,
        grouping=cfg.data.grouping,
        batching="packed" if cfg.train.batching == "packed" else "padded",
        # Methods whose loss divides by a fixed window choose it; all others leave out what fills no step.
        remainder=cfg.train.get("remainder", windows.DROP),
        least=method.least_slides,
    )


def _check_genes(experiment: Experiment, method: Method, needed: list[str]) -> None:
    absent = [field for field in needed if field not in experiment.gene_tables]
    if absent:
        raise ValueError(
            f"method {method.name} reads {', '.join(absent)}, but the configuration chooses none: set genes.kind and "
            "data.genes"
        )


def check_selection(cfg: ConfigDict, split: Split, fold: int) -> None:
    """Refuses early stopping without a validation part.

    Raises:
      ValueError: naming the settings to change.
    """
    if not len(split.val) and cfg.early_stop.enabled:
        raise ValueError(
            f"fold {fold} has no validation part, but early_stop.enabled=True selects on it: raise split.val_fraction, "
            "or train a fixed number of epochs with early_stop.enabled=False"
        )
