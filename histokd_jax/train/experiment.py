"""From a configuration to what a fold trains on: data set, cohort, splits, genes, planned batches."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import packing, schema
from data_pipelines.cohort import Cohort, build_cohort
from data_pipelines.genes import GeneSelection, GeneTable, select_genes
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import SlideTable, StepSource
from data_pipelines.reader import BagReader
from data_pipelines.splits import Split, make_folds, read_folds, split_fingerprint
from data_pipelines.tables import read_gene_table, read_ranking_table
from histokd_jax.types import DataSpec, Method

CNV = "cnv"
GENE_FIELDS = (schema.GENES, CNV)


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """Everything that is fixed before the first fold trains.

    Attributes:
      cfg: the resolved configuration.
      reader: reads the bags.
      cohort: the samples, joined with labels, genes and survival.
      gene_tables: batch field -> table aligned to the cohort ("genes", and "cnv" for two-stream variants).
      folds: splits of the cohort.
    """

    cfg: ConfigDict
    reader: BagReader
    cohort: Cohort
    gene_tables: Mapping[str, GeneTable]
    folds: list[Split]

    @property
    def manifest(self) -> Manifest:
        """Manifest of the data set."""
        return self.reader.manifest

    @property
    def num_classes(self) -> int:
        """Classes of the task."""
        return len(self.cohort.class_names)

    def data_spec(self, method_fields: tuple[str, ...]) -> DataSpec:
        """What the method must know about the data."""
        genes = self.cfg.genes.top_k if schema.GENES in method_fields else 0
        return DataSpec(self.manifest.feat_dim, self.num_classes, genes)


@dataclasses.dataclass(frozen=True, eq=False)
class FoldData:
    """What one fold trains and is evaluated on.

    Attributes:
      train: planned training batches.
      evaluation: "val" (absent without a validation part) and "test" -> planned exact passes.
      selections: batch field -> the genes chosen on this fold's training patients.
      split_hash: sha256 of the split.
    """

    train: StepSource
    evaluation: Mapping[str, StepSource]
    selections: Mapping[str, GeneSelection]
    split_hash: str


def load_experiment(cfg: ConfigDict) -> Experiment:
    """Opens the data set, joins the tables, makes or reads the splits.

    Raises:
      ValueError: anything that would make training wrong; names the file and the fix.
    """
    if not cfg.data.dir:
        raise ValueError("data.dir is empty: give the data set with --config.data.dir=DIRECTORY")
    manifest = Manifest.load(cfg.data.dir)
    check_width(manifest, cfg.data.feat_dim)
    paths = table_paths(cfg, manifest.directory)
    needs_genes = bool(cfg.teachers) if "teachers" in cfg else False
    if needs_genes and paths["genes"] is None:
        raise ValueError(
            f"data set {manifest.name} has no tables/genes.npz and data.genes is not set: the teachers need gene "
            "expression; give --config.data.genes=FILE"
        )
    cohort = build_cohort(
        manifest,
        labels_path=paths["labels"],
        task=cfg.task,
        genes_path=paths["genes"] if needs_genes else None,
        survival_path=paths["survival"],
        slide_choice=cfg.data.slide_choice,
        require_genes=True,
        her2_equivocal=cfg.labels.her2_equivocal if "labels" in cfg else "drop",
        unit=cfg.data.unit,
    )
    tables = {} if cohort.genes is None else {schema.GENES: cohort.genes}
    if cfg.get("variant") == "gmkdn":
        tables[CNV] = read_copy_number(cfg.data.cnv, cohort)
    return Experiment(cfg, BagReader(manifest), cohort, tables, _folds(cfg, cohort))


def resolve_width(cfg: ConfigDict) -> ConfigDict:
    """The configuration with data.feat_dim=0 replaced by the width of the data set, so that the record is explicit."""
    if cfg.data.feat_dim or not cfg.data.dir:
        return cfg
    resolved = ConfigDict(cfg.to_dict())
    resolved.data.feat_dim = Manifest.load(cfg.data.dir).feat_dim
    return resolved.lock()


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


def table_paths(cfg: ConfigDict, directory: pathlib.Path) -> dict[str, pathlib.Path | None]:
    """Files of labels, genes and survival: the configured ones, or the data set's own, or None."""
    own = {"labels": "labels.csv", "genes": "genes.npz", "survival": "survival.csv"}
    out = {}
    for name, file in own.items():
        given, default = cfg.data[name], pathlib.Path(directory) / "tables" / file
        out[name] = pathlib.Path(given) if given else (default if default.exists() else None)
    if out["labels"] is None:
        raise ValueError(f"no tables/labels.csv in the data set and data.labels is not set ({directory})")
    return out


def read_copy_number(path: str, cohort: Cohort) -> GeneTable:
    """The copy-number table of two-stream variants, aligned to the cohort.

    Raises:
      ValueError: no file given, or cases without copy number (listed).
    """
    if not path:
        raise ValueError("variant gmkdn reads two gene streams: give the copy-number table (data.cnv, or --cnv FILE)")
    table = read_gene_table(path, suffix="_cnv").align(cohort.sample_id)
    if not table.has_genes.all():
        lacking = [c for c, has in zip(cohort.sample_id, table.has_genes) if not has]
        raise ValueError(f"{path}: {len(lacking)} cases of the cohort have no copy number: {lacking[:5]}")
    return table


def _folds(cfg: ConfigDict, cohort: Cohort) -> list[Split]:
    if cfg.split.dir:
        return read_folds(
            cfg.split.dir,
            cohort,
            val_fraction=cfg.split.val_fraction,
            stratify=cfg.split.stratify,
            seed=cfg.split.seed,
            allow_patient_overlap=cfg.data.allow_patient_overlap,
        )
    return make_folds(
        cohort,
        n_folds=cfg.split.n_folds,
        val_fraction=cfg.split.val_fraction,
        stratify=cfg.split.stratify,
        seed=cfg.split.seed,
    )


def fold_data(experiment: Experiment, fold: int, method: Method) -> FoldData:
    """Gene selection on training patients, slot tables, and the plan of every epoch.

    Raises:
      ValueError: a validation or test part without every class (its monitor would be undefined), or as the planners.
    """
    cfg, split = experiment.cfg, experiment.folds[fold]
    _check_classes(experiment, split, fold)
    needed = [field for field in GENE_FIELDS if field in method.requires]
    selections = {field: _select(experiment, split, field) for field in needed}
    fields = {schema.LABEL: experiment.cohort.label}
    for field, selection in selections.items():
        fields[field] = selection.apply_table(experiment.gene_tables[field])
    if needed:
        fields[schema.HAS_GENES] = experiment.cohort.has_genes
    train_plan = _train_plan(experiment, split, method)
    evaluation = {}
    for part in ("val", "test"):
        rows = getattr(split, part)
        if not len(rows):
            continue
        plan = packing.plan_evaluation(
            experiment.manifest.sizes[experiment.cohort.slide_index[rows]],
            target_capacity=train_plan.capacity,
            num_slots=cfg.eval.slots,
            rows=_rows(cfg),
            multiple_of=cfg.data.row_multiple,
        )
        evaluation[part] = _source(experiment, rows, fields, plan)
    return FoldData(
        train=_source(experiment, split.train, fields, train_plan),
        evaluation=evaluation,
        selections=selections,
        split_hash=split_fingerprint(split, experiment.cohort),
    )


def share_shapes(folds: list[FoldData]) -> list[FoldData]:
    """Gives the steps of all folds one row length, so that one compiled program serves them; empty chunks are free."""

    def longest(sources):
        return max(source.plan.row_patches for source in sources)

    def stretch(source, length):
        return dataclasses.replace(source, plan=dataclasses.replace(source.plan, row_patches=length))

    train = longest(fold.train for fold in folds)
    evaluation = longest(source for fold in folds for source in fold.evaluation.values())
    return [
        dataclasses.replace(
            fold,
            train=stretch(fold.train, train),
            evaluation={part: stretch(source, evaluation) for part, source in fold.evaluation.items()},
        )
        for fold in folds
    ]


def _rows(cfg: ConfigDict) -> int:
    return cfg.data.rows or max(cfg.mesh.data, 1)


def _source(experiment: Experiment, rows: np.ndarray, fields: Mapping[str, np.ndarray], plan: Any) -> StepSource:
    table = SlideTable(experiment.cohort.slide_index[rows], {name: value[rows] for name, value in fields.items()})
    return StepSource(experiment.reader, table, plan, dtype=experiment.manifest.dtype)


def _train_plan(experiment: Experiment, split: Split, method: Method) -> packing.PackPlan:
    cfg = experiment.cfg
    if not cfg.train.drop_last:
        raise ValueError("train.drop_last=False: a batch-coupled step holds exactly train.b slides; keep it True")
    sizes = experiment.manifest.sizes[experiment.cohort.slide_index[split.train]]
    labels = experiment.cohort.label[split.train]
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
    )


def _select(experiment: Experiment, split: Split, field: str) -> GeneSelection:
    genes, survival = experiment.cfg.genes, experiment.cohort.survival
    return select_genes(
        experiment.gene_tables[field],
        split.train,
        survival=None if survival is None else (survival.time_months, survival.event),
        label=experiment.cohort.label,
        top_k=genes.top_k,
        token_size=genes.token_size,
        filter=genes.filter,
        ranking=genes.ranking,
        ranking_scope=genes.ranking_scope,
        normalisation=genes.normalisation,
        exclude=tuple(genes.exclude),
        nan_policy=genes.nan_policy,
        clip=genes.clip,
        seed=experiment.cfg.seed,
        ranking_table=_ranking_table(genes) if genes.ranking == "table" else None,
    )


def _ranking_table(genes: ConfigDict) -> dict[str, float]:
    if not genes.ranking_table:
        raise ValueError("genes.ranking=table needs genes.ranking_table=FILE, a CSV with the columns gene and p")
    return read_ranking_table(genes.ranking_table)


def _check_classes(experiment: Experiment, split: Split, fold: int) -> None:
    if not len(split.val) and experiment.cfg.early_stop.enabled:
        raise ValueError(
            f"fold {fold} has no validation part, but early_stop.enabled=True selects on it: raise split.val_fraction, "
            "or train a fixed number of epochs with early_stop.enabled=False"
        )
    for part in ("train", "val", "test") if len(split.val) else ("train", "test"):
        rows = getattr(split, part)
        present = set(experiment.cohort.label[rows].tolist())
        absent = [name for c, name in enumerate(experiment.cohort.class_names) if c not in present]
        if not len(rows) or (absent and experiment.num_classes == 2) or len(present) < 2:
            raise ValueError(
                f"fold {fold}: the {part} part has {len(rows)} samples and lacks class {absent}: AUC is undefined; "
                "use fewer folds, split.stratify=True, or other splits"
            )
