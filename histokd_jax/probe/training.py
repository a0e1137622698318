"""All probes of one encoder: folds x label fractions x seeds, as few programs as shapes allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.labelled.parts import Fold, Parts, label_subsets
from data_pipelines.labelled.patches import LabelledPatches
from histokd_jax.evals.predictions import Predictions, concatenate, make_predictions
from histokd_jax.probe.features import decoded, scale_of
from histokd_jax.probe.finetune import finetune
from histokd_jax.probe.knn import knn_probabilities
from histokd_jax.probe.linear import fit_linear
from histokd_jax.probe.mlp import FAITHFUL, train_mlp
from histokd_jax.probe.settings import FINETUNE, KNN, LINEAR, MLP, Settings, mode_of
from histokd_jax.probe.sources import Source

Say = Callable[[str], None]
NOT_FINITE = "the probabilities are not finite: the training diverged"


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A linear probe on raw embeddings: logits = features @ weights + bias; [D, C] and [C] float64."""

    weights: np.ndarray
    bias: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Probed:
    """What the probes of one encoder found.

    Attributes:
      runs: (seed, fold) -> predictions of the fold's test part, one mode per probe and label fraction.
      linear: fold -> linear probe on the most labels, first seed.
      failed: what did not finish, and why.
      notes: for people.
    """

    runs: Mapping[tuple[int, int], Predictions]
    linear: Mapping[int, Classifier]
    failed: Mapping[str, str]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """One fold of one encoder."""

    source: Source
    clean: np.ndarray
    views: np.ndarray | None
    patches: LabelledPatches
    settings: Settings
    number: int
    fold: Fold
    subsets: Mapping[tuple[int, float], np.ndarray]

    @property
    def num_classes(self) -> int:
        return len(self.patches.class_names)

    def cells(self, deterministic: bool) -> list[tuple[int, float]]:
        """(seed, fraction); what does not depend on the seed is done once with all labels."""
        first = self.settings.seeds[0]
        return [(s, f) for s, f in self.subsets if not (deterministic and f == 1 and s != first)]

    def masks(self, cells: list[tuple[int, float]]) -> np.ndarray:
        """[S, N] bool."""
        found = np.zeros((len(cells), len(self.patches)), bool)
        for row, cell in enumerate(cells):
            found[row, self.subsets[cell]] = True
        return found


Answers = Iterator[tuple[str, int, np.ndarray]]
"""(mode, seed, [len(test), C] probabilities)."""


def train_probes(
    source: Source, clean: np.ndarray, views: np.ndarray | None, patches: LabelledPatches, parts: Parts,
    settings: Settings, say: Say = lambda _: None,
) -> Probed:  # fmt: skip
    """Trains every probe of one encoder.

    Args:
      source: the encoder, or features.
      clean: [n, D] its embeddings; NaN where a given value is absent.
      views: [V, n, D] embeddings of augmented views for `mlp256`, or None.
      patches: the data.
      parts: its split.
      settings: which probes, and how.
      say: told what begins.

    Returns:
      Predictions, the linear probes, failures and notes.

    Raises:
      DataError: fine-tuning of features, or of images of several sizes.
    """
    found: dict[tuple[int, int], list[Predictions]] = {}
    linear, failed, notes = {}, {}, []
    images = _images(source, patches) if FINETUNE in settings.probes else None
    for number, fold in enumerate(parts.folds):
        work = _Work(source, clean, views, patches, settings, number, fold, _subsets(patches, fold, number, settings))
        notes += _few_neighbours(work) if number == 0 and KNN in settings.probes else []
        say(f"{source.label}: fold {number + 1} of {len(parts.folds)}, {len(fold.train)} train, {len(fold.test)} test")
        for mode, seed, probs in _answers(work, linear, notes, images):
            if not np.isfinite(probs).all():
                failed[f"{source.label}, {mode}, seed {seed}, fold {number}"] = NOT_FINITE
                continue
            rows = fold.test
            case, ids = [parts.unit[r] for r in rows], [patches.ids[r] for r in rows]
            table = make_predictions(case, ids, number, mode, patches.label[rows], probs)
            found.setdefault((seed, number), []).append(table)
    return Probed({pair: concatenate(tables) for pair, tables in found.items()}, linear, failed, tuple(notes))


def _subsets(
    patches: LabelledPatches, fold: Fold, number: int, settings: Settings
) -> dict[tuple[int, float], np.ndarray]:
    return {
        (seed, fraction): rows
        for seed in settings.seeds
        for fraction, rows in label_subsets(patches.label, fold.train, settings.fractions, [seed, number]).items()
    }


def _few_neighbours(work: _Work) -> list[str]:
    fewest = min(map(len, work.subsets.values()))
    return [
        f"{k} neighbours, but only {fewest} labels in the smallest subset: there all of them vote"
        for k in work.settings.ks
        if k > fewest
    ]


def _answers(work: _Work, linear: dict, notes: list[str], images: np.ndarray | None) -> Answers:
    for probe in work.settings.probes:
        if probe == LINEAR:
            yield from _linear(work, linear, notes)
        elif probe == KNN:
            yield from _neighbours(work)
        elif probe == MLP:
            yield from _heads(work)
        else:
            yield from _tuned(work, images)


def _linear(work: _Work, linear: dict, notes: list[str]) -> Answers:
    cells = work.cells(deterministic=True)
    scale = scale_of(work.clean, work.fold.train)
    x = scale.standardised(work.clean)
    found = fit_linear(x, work.patches.label, work.masks(cells), work.num_classes, work.settings.l2)
    if not found.converged.all():
        count = int((~found.converged).sum())
        notes.append(f"{work.source.label}, fold {work.number}: {count} linear probes stopped before they converged")
    weights = found.weights[0].astype(np.float64) / scale.divisor[:, None]
    linear[work.number] = Classifier(weights, found.bias[0] - scale.mean @ weights)
    for row, (seed, fraction) in enumerate(cells):
        yield mode_of(LINEAR, fraction), seed, found.probs[row, work.fold.test]


def _neighbours(work: _Work) -> Answers:
    settings, cells = work.settings, work.cells(deterministic=True)
    scale = scale_of(work.clean, work.fold.train)
    x = scale.standardised(work.clean) if settings.knn_standardise else scale.filled(work.clean)
    masks, label = work.masks(cells), work.patches.label
    found = knn_probabilities(x, label, masks, work.fold.test, settings.ks, work.num_classes, settings.votes)
    for place, k in enumerate(settings.ks):
        for row, (seed, fraction) in enumerate(cells):
            yield mode_of(KNN, fraction, k), seed, found[place, row]


def _heads(work: _Work) -> Answers:
    """One program per label fraction: seeds of equal size side by side."""
    settings, scale = work.settings, scale_of(work.clean, work.fold.train)
    # The batch norm in front scales anyway, but for its epsilon; as released, features come as they are.
    change = scale.filled if settings.head.protocol == FAITHFUL else scale.standardised
    clean = change(work.clean)
    views = clean[None] if work.views is None else change(work.views)
    seeds = np.array(settings.seeds)
    for fraction in settings.fractions:
        rows = np.stack([work.subsets[seed, fraction] for seed in settings.seeds])
        # Whole batches: folds that differ by a few patches share a program.
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % settings.head.batch)), constant_values=-1)
        probs = train_mlp(views, clean, work.patches.label, rows, work.num_classes, seeds, settings.head)
        for row, seed in enumerate(settings.seeds):
            yield mode_of(MLP, fraction), seed, probs[row, work.fold.test]


def _tuned(work: _Work, images: np.ndarray) -> Answers:
    """One training after the other: each has an encoder of its own."""
    for (seed, fraction), rows in work.subsets.items():
        arguments = (work.source.loaded, images, work.patches.label, rows, work.fold.test, work.num_classes, seed)
        yield mode_of(FINETUNE, fraction), seed, finetune(*arguments, work.settings.tune)


def _images(source: Source, patches: LabelledPatches) -> np.ndarray:
    """[n, e, e, 3] uint8 in memory."""
    if source.loaded is None:
        raise DataError(f"{source.label} is a feature array: only an encoder can be fine-tuned; leave finetune out")
    found = [image for _, image in decoded(patches, range(len(patches)), threads=2)]
    sizes = sorted({len(image) for image in found})
    if len(sizes) > 1:
        raise DataError(f"{patches.name}: fine-tuning needs images of one size, found edges of {sizes} px; resize them")
    return np.stack(found)
