"""From a configuration to what a fold trains on, for image pairs: data set, labels, splits, planned batches.

The counterpart of `experiment`, which does the same for bags; both give the trainer the same `Experiment` surface and
`FoldData`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines import schema
from data_pipelines.assembler import SlideTable
from data_pipelines.cohort import Cohort
from data_pipelines.pairs.cohort import has_official_parts, labelled_rows, official_split, pair_cohort, with_unlabelled
from data_pipelines.pairs.manifest import PairManifest
from data_pipelines.pairs.reader import PairReader
from data_pipelines.pairs.steps import IMAGE, NO_PARTNER, VECTOR, PairSource, plan_evaluation, plan_training
from data_pipelines.pipeline import make_eval_dataset
from data_pipelines.splits import CORRECTED, Split, make_folds, read_folds, split_fingerprint
from histokd_jax.tasks import Task, get_task
from histokd_jax.train import frozen_models, sharding
from histokd_jax.train.experiment import FoldData, check_selection, split_marks
from histokd_jax.train.pair_feed import PairFeeder
from histokd_jax.types import CLASSIFICATION, REPRESENTATION, DataSpec, Method

AUTO = "auto"
PARTNER_CHOICES = (AUTO, IMAGE, VECTOR, NO_PARTNER)
TASKS = (CLASSIFICATION, REPRESENTATION)


@dataclasses.dataclass(frozen=True, eq=False)
class PairExperiment:
    """Everything that is fixed before the first fold trains.

    Attributes:
      cfg: the resolved configuration.
      manifest: of the data set.
      reader: reads the examples.
      cohort: the examples; a case is a group.
      folds: splits of the cohort.
    """

    cfg: ConfigDict
    manifest: PairManifest
    reader: PairReader
    cohort: Cohort
    folds: list[Split]

    @property
    def num_classes(self) -> int:
        """Classes of the task."""
        return len(self.cohort.class_names)

    @property
    def task(self) -> Task:
        """The kind of answer."""
        return get_task(self.cfg)

    @property
    def marks(self) -> list[str]:
        """What the protocol demands to be said beside every number."""
        return split_marks(self.folds, self.cfg)

    def data_spec(self, method_fields: tuple[str, ...] = (), fold: int = 0) -> DataSpec:
        """What the method must know about the data; equal for all folds."""
        del method_fields, fold
        vector = self.manifest.vector_size if partner_of(self.cfg, self.manifest) == VECTOR else 0
        return DataSpec(
            feat_dim=0,
            num_classes=self.num_classes,
            task=self.task.kind,
            image_size=self.manifest.image_size,
            vector_size=vector,
        )


def open_manifest(directory: str) -> PairManifest:
    """The manifest of a data set of this kind."""
    return PairManifest.load(directory)


def resolve(cfg: ConfigDict) -> ConfigDict:
    """Nothing of the configuration depends on the data set."""
    return cfg


def partner_of(cfg: ConfigDict, manifest: PairManifest) -> str:
    """What the field `partner` holds (data.partner): "image", "vector" or "none"; auto takes what the data set has.

    Raises:
      ValueError: unknown setting, auto with both, or what the data set does not have.
    """
    wanted = cfg.data.get("partner", AUTO)
    if wanted not in PARTNER_CHOICES:
        raise ValueError(f"data.partner={wanted!r} is unknown; choose one of {PARTNER_CHOICES}")
    if wanted != AUTO:
        if not {IMAGE: manifest.partner, VECTOR: manifest.vector_size, NO_PARTNER: True}[wanted]:
            raise ValueError(
                f"data.partner={wanted}, but data set {manifest.name} has no partner {wanted}s: write it again with "
                "them (`histokd pairs`)"
            )
        return wanted
    if manifest.partner and manifest.vector_size:
        raise ValueError(
            f"data set {manifest.name} has partner images and vectors: set data.partner=image or data.partner=vector"
        )
    return IMAGE if manifest.partner else VECTOR if manifest.vector_size else NO_PARTNER


def load_experiment(cfg: ConfigDict) -> PairExperiment:
    """Opens the data set and makes or reads the splits.

    Raises:
      ValueError: anything that would make training wrong; names the file and the fix.
    """
    if not cfg.data.dir:
        raise ValueError("data.dir is empty: give the data set with --config.data.dir=DIRECTORY (see `histokd pairs`)")
    task = get_task(cfg)
    if task.kind not in TASKS:
        raise ValueError(
            f"image pairs have class labels or none, not task_kind={task.kind}: set task_kind to one of {TASKS}"
        )
    reader = PairReader(cfg.data.dir)
    cohort = pair_cohort(reader.manifest, cfg.task)
    return PairExperiment(cfg, reader.manifest, reader, cohort, _folds(cfg, reader.manifest, cohort))


def _folds(cfg: ConfigDict, manifest: PairManifest, cohort: Cohort) -> list[Split]:
    options = {name: cfg.split[name] for name in ("val_fraction", "stratify", "seed")}
    options["protocol"] = cfg.split.get("protocol", CORRECTED)
    overlap = cfg.data.allow_patient_overlap
    if get_task(cfg).kind == REPRESENTATION:
        return _label_free_folds(cfg, manifest, cohort, options)
    if not cfg.split.dir and cfg.data.get("official_split", True) and has_official_parts(manifest):
        return [official_split(manifest, cohort, allow_patient_overlap=overlap, **options)]
    kept = labelled_rows(cohort)
    labelled = cohort.subset(kept)
    if cfg.split.dir:
        folds = read_folds(cfg.split.dir, labelled, allow_patient_overlap=overlap, **options)
    else:
        folds = make_folds(labelled, n_folds=cfg.split.n_folds, **options)
    return [with_unlabelled(split, cohort, kept) for split in folds]


def _label_free_folds(cfg: ConfigDict, manifest: PairManifest, cohort: Cohort, options: dict[str, Any]) -> list[Split]:
    """Splits of all examples, by group; labels are neither needed nor read."""
    options, overlap = {**options, "stratify": False}, cfg.data.allow_patient_overlap
    if cfg.split.dir:
        return read_folds(cfg.split.dir, cohort, allow_patient_overlap=overlap, **options)
    if cfg.data.get("official_split", True) and has_official_parts(manifest):
        return [official_split(manifest, cohort, allow_patient_overlap=overlap, need_labels=False, **options)]
    return make_folds(cohort, n_folds=cfg.split.n_folds, **options)


def fold_data(experiment: PairExperiment, fold: int, method: Method) -> FoldData:
    """Fields of the examples, and the plan of every epoch.

    Raises:
      ValueError: a part whose metrics would be undefined, a class without training examples, or as the planner.
    """
    cfg, cohort, split = experiment.cfg, experiment.cohort, experiment.folds[fold]
    check_selection(cfg, split, fold)
    experiment.task.check_split(cohort, split, fold)
    if experiment.task.kind == CLASSIFICATION:
        _check_classes(cohort, split, fold)
    task = experiment.task.fit(cohort, split.train)
    targets = task.targets(cohort)
    plan = plan_training(
        len(split.train),
        task.sampling_classes(targets)[split.train],
        batch=cfg.train.b,
        epochs=cfg.train.max_epochs,
        seed=cfg.seed,
        sampler=cfg.train.sampler,
        drop_last=cfg.train.drop_last,
    )
    train_partner = partner_of(cfg, experiment.manifest) if _needs_partner(method.requires) else NO_PARTNER
    if _needs_partner(method.requires) and train_partner == NO_PARTNER:
        raise ValueError(
            f"method {method.name} learns from partners, but data set {experiment.manifest.name} gives no partners "
            f"(data.partner={cfg.data.get('partner', AUTO)}): write it again with them (`histokd pairs`), or set "
            "data.partner"
        )
    # Every mode is evaluated in one pass, so the pass holds what any of them reads.
    fields = {field for mode in method.modes for field in mode.fields}
    partner = train_partner if _needs_partner(fields) else NO_PARTNER
    # A mode that also reads whether there is a partner leaves out what it cannot compare.
    parts = () if schema.HAS_PARTNER in fields else ("val", "test")
    _check_partners(experiment.manifest, cohort, split, fold, partner, parts)
    _check_any_partner(experiment.manifest, cohort, split, fold, train_partner)
    evaluation = {
        part: make_source(experiment.reader, cohort, rows, partner, plan_evaluation(len(rows), cfg.train.b))
        for part in ("val", "test")
        if len(rows := getattr(split, part))
    }
    split_hash = split_fingerprint(split, cohort)
    return FoldData(
        train=make_source(experiment.reader, cohort, split.train, train_partner, plan),
        evaluation=evaluation,
        selections={},
        split_hash=split_hash,
        task=task,
        split=split,
        targets=targets,
        marks=frozen_models.marks(cfg, fold, split_hash),
    )


def make_source(reader: PairReader, cohort: Cohort, rows: np.ndarray, partner: str, plan: Any) -> PairSource:
    """The batches of some rows of a cohort, with the fields `label` and `has_label`."""
    label = cohort.label[rows]
    fields = {schema.LABEL: np.maximum(label, 0), schema.HAS_LABEL: label >= 0}
    return PairSource(reader, SlideTable(cohort.slide_index[rows], fields), plan, partner)


def training_pass(experiment: PairExperiment, data: FoldData) -> Iterable[Mapping[str, np.ndarray]]:
    """Host batches that hold every training example once, with its partner."""
    rows, batch = data.split.train, data.train.plan.num_slots
    plan = plan_evaluation(len(rows), batch)
    source = make_source(experiment.reader, experiment.cohort, rows, data.train.partner, plan)
    return make_eval_dataset(source, num_threads=experiment.cfg.data.threads)


def share_shapes(folds: list[FoldData]) -> list[FoldData]:
    """The steps of all folds have one shape already."""
    return folds


def check_mesh(mesh: Mesh, cfg: ConfigDict, data: FoldData) -> None:
    """Refuses, before anything is compiled, settings of bags and a mesh that does not divide the steps.

    Raises:
      ValueError: naming the setting.
    """
    if cfg.train.batching == "grad_cache":
        raise ValueError("train.batching=grad_cache holds one bag at a time; image pairs have none: use packed")
    for source in (data.train, *data.evaluation.values()):
        sharding.check_examples(mesh, source.plan.num_slots)


def make_feeder(cfg: ConfigDict, mesh: Mesh, sources: Sequence[PairSource], cache: Any = None) -> PairFeeder:
    """Reads every step from the shards.

    Raises:
      ValueError: data.resident=on, which is for bags.
    """
    del sources, cache
    if cfg.data.get("resident", "off") == "on":
        raise ValueError("data.resident=on keeps bags in device memory; image pairs are read from disk: set it to off")
    return PairFeeder(mesh, cfg.data.threads, cfg.data.buffer_mib * 2**20)


def _needs_partner(fields: Collection[str]) -> bool:
    return schema.PARTNER in fields


def _lacking(manifest: PairManifest, cohort: Cohort, rows: np.ndarray, partner: str) -> list[int]:
    """The rows of examples without a partner."""
    has = "has_partner" if partner == IMAGE else "has_vector"
    return [row for row in rows if not getattr(manifest.examples[cohort.slide_index[row]], has)]


def _check_any_partner(manifest: PairManifest, cohort: Cohort, split: Split, fold: int, partner: str) -> None:
    """Examples without a partner are counted; training needs some that have one."""
    lacking = [] if partner == NO_PARTNER else _lacking(manifest, cohort, split.train, partner)
    if len(lacking) and len(lacking) == len(split.train):
        raise ValueError(
            f"fold {fold}: none of the {len(lacking)} training examples has a partner {partner}, which this method "
            "learns from: import the data again with their partners (`histokd pairs`), or use another split"
        )
    if lacking:
        logging.info("fold %d: %d of %d training examples have no partner", fold, len(lacking), len(split.train))


def _check_partners(
    manifest: PairManifest, cohort: Cohort, split: Split, fold: int, partner: str, parts: Sequence[str]
) -> None:
    """A mode that reads partners can only be evaluated on examples that have one."""
    if partner == NO_PARTNER:
        return
    for part in parts:
        lacking = _lacking(manifest, cohort, getattr(split, part), partner)
        if lacking:
            raise ValueError(
                f"fold {fold}: {len(lacking)} examples of the {part} part have no partner {partner} (first "
                f"{cohort.slide_id[lacking[0]]}), which a mode that is evaluated reads: leave them out with `histokd "
                "pairs --missing-partner quarantine`, or give official parts that keep them in training"
            )


def _check_classes(cohort: Cohort, split: Split, fold: int) -> None:
    """Every class of the data set needs training examples."""
    counts = np.bincount(cohort.label[split.train][cohort.label[split.train] >= 0], minlength=len(cohort.class_names))
    absent = [name for name, count in zip(cohort.class_names, counts) if not count]
    if absent:
        have = ", ".join(f"{name}: {count}" for name, count in zip(cohort.class_names, counts))
        raise ValueError(
            f"fold {fold}: no training example has the label {', '.join(absent)} ({have}), so it could never be "
            "predicted: use another split or fewer folds, or import the data with `histokd pairs --classes` without it"
        )
