"""Computes plans: which slides, and which of their patches, share a step.

Pure functions of sizes, labels, seed and epoch. All epochs are planned up front: the largest step of the run then
fixes one shape, and training compiles once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines import binpacking, sampling, windows
from data_pipelines.plan import BATCHINGS, PackPlan, StepPlan

__all__ = ["BATCHINGS", "GROUPINGS", "KERNEL_CHUNK", "PackPlan", "PlanOptions", "StepPlan"]
__all__ += ["plan_coupled", "plan_evaluation", "plan_free"]

GROUPINGS = ("size_balanced", "random")
KERNEL_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Choices that both kinds of training plan share.

    Attributes:
      epochs: epochs to plan, i.e. the largest number that training may run.
      seed: seed of draws, groups and sub-sampling.
      sampler: one of `sampling.SAMPLERS`.
      rows: R of packed steps; a multiple of the number of devices that share the rows.
      multiple_of: L is rounded up to a multiple of this (the chunk length of the pooling kernel).
      max_patches: patches per slide and epoch, None for all; a new random start every epoch.
      chunk_patches: patches per stored record; random starts are aligned to it, so that only the chunks that hold the
        wanted patches are read.
    """

    epochs: int
    seed: int
    sampler: str = "class_balanced_replacement"
    rows: int = 1
    multiple_of: int = KERNEL_CHUNK
    max_patches: int | None = None
    chunk_patches: int = 1

    def __post_init__(self):
        for name in ("epochs", "rows", "multiple_of", "chunk_patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a plan is {getattr(self, name)}; expected >= 1")
        if self.max_patches is not None and self.max_patches < 1:
            raise ValueError(f"data.max_patches_train is {self.max_patches}; expected >= 1, or null for all patches")
        if self.sampler not in sampling.SAMPLERS:
            raise ValueError(f"train.sampler is {self.sampler!r}; expected one of {sampling.SAMPLERS}")


def plan_coupled(
    sizes: np.ndarray,
    labels: np.ndarray | None,
    options: PlanOptions,
    *,
    slides_per_step: int,
    grouping: str = "size_balanced",
    batching: str = "packed",
    remainder: str = windows.DROP,
) -> PackPlan:
    """Plan for losses that couple slides: every step holds exactly b slides, floor(n / b) steps per epoch.

    By default a trailing incomplete step never exists (`train.drop_last`; mkd.md section 6). `size_balanced` draws
    stratified by size and groups slides so that all steps are nearly equally long; `random` is the faithful iid draw in
    plain order.

    Args:
      sizes: [n] int, patches per slide, all >= 1.
      labels: [n] int classes; may be None with sampler 'uniform'.
      options: see `PlanOptions`; `rows` is ignored by 'padded'.
      slides_per_step: b, at least 1 and at most n.
      grouping: one of `GROUPINGS`.
      batching: 'packed', or 'padded' (one row per slot; the same slides, starts and counts as packed).
      remainder: 'drop', 'carry' or 'flush_scaled', see `windows.accumulation_windows`: with 'carry' the first step of
        an epoch also holds what filled no step of the epoch before, with 'flush_scaled' the last step is shorter. Both
        need grouping 'random'; the loss must know its divisor.

    Returns:
      The plan of all epochs.

    Raises:
      ValueError: on malformed sizes or labels, b < 2, b > n, or an unknown option.
    """
    sizes = _checked_sizes(sizes)
    _check_coupled(len(sizes), slides_per_step, grouping, batching)
    kept = _kept(sizes, options)
    parameters = {"mode": "coupled", "grouping": grouping, **dataclasses.asdict(options)}
    if remainder == windows.DROP:
        slide = _exact_steps(kept, labels, options, slides_per_step, grouping)
    else:
        slide = _windowed_steps(kept, labels, options, slides_per_step, grouping, remainder)
        parameters["remainder"] = remainder
    start, count = _subsample(slide, sizes, kept, options)
    padded = batching == "padded"
    rows = slide.shape[2] if padded else options.rows
    capacity = int(count.max()) * rows if padded else int(count.sum(axis=2, dtype=np.int64).max())
    row_patches = _row_patches(capacity, rows, options.multiple_of)
    return PackPlan(sizes, slide, start, count, rows, row_patches, batching, parameters)


def _exact_steps(
    kept: np.ndarray, labels: np.ndarray | None, options: PlanOptions, slides_per_step: int, grouping: str
) -> np.ndarray:
    """[epochs, steps, b] int32 slides of steps that all are full."""
    steps, epochs = len(kept) // slides_per_step, []
    for epoch in range(options.epochs):
        drawn = _draw(kept, labels, steps * slides_per_step, options, epoch, stratified=grouping == "size_balanced")
        if grouping == "size_balanced":
            rng = sampling.epoch_rng(options.seed, epoch, sampling.Stream.GROUP)
            drawn = drawn[binpacking.balanced_groups(kept[drawn], slides_per_step, rng)]
        epochs.append(drawn.reshape(steps, slides_per_step))
    return np.stack(epochs).astype(np.int32)


def _windowed_steps(
    kept: np.ndarray,
    labels: np.ndarray | None,
    options: PlanOptions,
    slides_per_step: int,
    grouping: str,
    remainder: str,
) -> np.ndarray:
    """[epochs, steps, S] int32 slides of accumulation windows, -1 in empty slots; every one of n draws counts."""
    if grouping != "random":
        raise ValueError(f"train.remainder={remainder!r} keeps drawn order: set data.grouping=random, or drop")
    epochs = windows.accumulation_windows(len(kept), slides_per_step, options.epochs, remainder)
    drawn = [_draw(kept, labels, len(kept), options, epoch, stratified=False) for epoch in range(options.epochs)]
    return _slot_table([[np.array([drawn[e][i] for e, i in w.samples]) for w in epoch] for epoch in epochs], None)


def plan_free(
    sizes: np.ndarray,
    labels: np.ndarray | None,
    options: PlanOptions,
    *,
    capacity: int,
    num_slots: int | None = None,
) -> PackPlan:
    """Training plan for losses that do not couple slides: as many slides per step as fit.

    n draws per epoch; windows of 256 slides in random order are packed first-fit by (slightly perturbed) decreasing
    size. An epoch that needs fewer steps than the longest one splits its steps with most slides, so that every epoch
    has the same number of steps and none is empty.

    Args:
      sizes: [n] int, patches per slide, all >= 1.
      labels: [n] int classes; may be None with sampler 'uniform'.
      options: see `PlanOptions`.
      capacity: T, patches per step; rounded up to rows * multiple_of.
      num_slots: S, slides that a step may hold; None for as many as the plan needs.

    Returns:
      The plan of all epochs.

    Raises:
      ValueError: on malformed sizes or labels, or a slide that does not fit in a step.
    """
    sizes = _checked_sizes(sizes)
    kept = _kept(sizes, options)
    row_patches = _row_patches(capacity, options.rows, options.multiple_of)
    binpacking.check_items(kept, options.rows * row_patches, num_slots)
    epochs = []
    for epoch in range(options.epochs):
        drawn = _draw(kept, labels, len(sizes), options, epoch, stratified=True)
        rng = sampling.epoch_rng(options.seed, epoch, sampling.Stream.GROUP)
        groups = binpacking.first_fit_groups(kept[drawn], options.rows * row_patches, num_slots, rng=rng)
        epochs.append([drawn[group] for group in groups])
    steps = max(map(len, epochs))
    slide = _slot_table([binpacking.split_to(groups, steps) for groups in epochs], num_slots)
    start, count = _subsample(slide, sizes, kept, options)
    parameters = {"mode": "free", **dataclasses.asdict(options)}
    return PackPlan(sizes, slide, start, count, options.rows, row_patches, "packed", parameters)


def plan_evaluation(
    sizes: np.ndarray,
    *,
    target_capacity: int = 0,
    num_slots: int | None = None,
    rows: int = 1,
    multiple_of: int = KERNEL_CHUNK,
) -> PackPlan:
    """Plan of one pass that reads every patch of every slide exactly once, without randomness.

    Args:
      sizes: [n] int, patches per slide, all >= 1.
      target_capacity: wanted patches per step. The capacity is never below the largest bag, so nothing is truncated,
        and it shrinks to the least that needs no more steps, so that a small set does not leave its steps half empty.
      num_slots: S, slides that a step may hold; None for as many as the plan needs.
      rows: R.
      multiple_of: L is a multiple of this.

    Returns:
      A plan of one epoch.

    Raises:
      ValueError: on malformed sizes or shapes.
    """
    sizes = _checked_sizes(sizes)
    floor = _row_patches(int(sizes.max()), rows, multiple_of)
    wanted = max(floor, _row_patches(target_capacity, rows, multiple_of))
    row_patches, groups = _tightest(sizes, floor, wanted, rows, multiple_of, num_slots)
    slide = _slot_table([groups], num_slots)
    count = np.where(slide >= 0, sizes[slide], 0).astype(np.int32)
    parameters = {"mode": "evaluation", "multiple_of": multiple_of}
    return PackPlan(sizes, slide, np.zeros_like(slide), count, rows, row_patches, "packed", parameters)


def _tightest(
    sizes: np.ndarray, floor: int, wanted: int, rows: int, multiple_of: int, num_slots: int | None
) -> tuple[int, list[np.ndarray]]:
    """Least row length in [floor, wanted] (by bisection) that packs into as few steps as `wanted` does."""
    best = wanted, binpacking.first_fit_groups(sizes, rows * wanted, num_slots)
    low, high = floor // multiple_of, wanted // multiple_of
    while low < high:
        middle = (low + high) // 2
        groups = binpacking.first_fit_groups(sizes, rows * middle * multiple_of, num_slots)
        if len(groups) <= len(best[1]):
            best, high = (middle * multiple_of, groups), middle
        else:
            low = middle + 1
    return best


def _kept(sizes: np.ndarray, options: PlanOptions) -> np.ndarray:
    return sizes if options.max_patches is None else np.minimum(sizes, options.max_patches)


def _draw(
    kept: np.ndarray, labels: np.ndarray | None, num_draws: int, options: PlanOptions, epoch: int, *, stratified: bool
) -> np.ndarray:
    rng = sampling.epoch_rng(options.seed, epoch, sampling.Stream.DRAW)
    return sampling.draw_epoch(kept, labels, num_draws, sampler=options.sampler, stratified=stratified, rng=rng)


def _checked_sizes(sizes: np.ndarray) -> np.ndarray:
    sizes = np.asarray(sizes)
    if sizes.ndim != 1 or len(sizes) == 0 or not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"sizes are {sizes.dtype}{sizes.shape}; expected integers [n] with n >= 1, one per slide")
    if sizes.min() < 1:
        row = int(np.argmin(sizes))
        raise ValueError(f"slide {row} has {sizes[row]} patches; expected >= 1: remove empty bags from the cohort")
    return sizes.astype(np.int64)


def _check_coupled(n: int, b: int, grouping: str, batching: str) -> None:
    if b < 1:
        raise ValueError(f"train.b is {b}; a step needs at least 1 slide (2 if its losses compare slides)")
    if b > n:
        raise ValueError(f"train.b is {b} but there are only {n} training slides: lower train.b to at most {n}")
    if grouping not in GROUPINGS:
        raise ValueError(f"data.grouping is {grouping!r}; expected one of {GROUPINGS}")
    if batching not in BATCHINGS:
        raise ValueError(f"batching of a plan is {batching!r}; expected one of {BATCHINGS}")


def _row_patches(capacity: int, rows: int, multiple_of: int) -> int:
    """L: the smallest multiple of `multiple_of` with rows * L >= capacity."""
    if rows < 1 or multiple_of < 1:
        raise ValueError(f"rows is {rows} and multiple_of is {multiple_of}; expected both >= 1")
    return max(1, -(-capacity // (rows * multiple_of))) * multiple_of


def _subsample(
    slide: np.ndarray, sizes: np.ndarray, kept: np.ndarray, options: PlanOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Start and count of every slot; a slide read in part starts at a uniformly random chunk."""
    real = slide >= 0
    count = np.where(real, kept[slide], 0).astype(np.int32)
    start = np.zeros_like(slide)
    n_chunks = -(-sizes // options.chunk_patches)
    for epoch in range(len(slide)):
        rng = sampling.epoch_rng(options.seed, epoch, sampling.Stream.START)
        chunk = (rng.random(slide[epoch].shape) * n_chunks[slide[epoch]]).astype(np.int32)
        partial = real[epoch] & (count[epoch] < sizes[slide[epoch]])
        start[epoch] = np.where(partial, chunk * options.chunk_patches, 0)
    return start, count


def _slot_table(epoch_groups: Sequence[Sequence[np.ndarray]], num_slots: int | None) -> np.ndarray:
    """[epochs, steps, S] int32 from lists of groups; -1 marks empty slots."""
    needed = max(len(group) for groups in epoch_groups for group in groups)
    if num_slots is not None and needed > num_slots:
        raise ValueError(f"a step holds {needed} slides but only {num_slots} slots: raise num_slots")
    slots = needed if num_slots is None else num_slots
    table = np.full((len(epoch_groups), len(epoch_groups[0]), slots), -1, np.int32)
    for epoch, groups in enumerate(epoch_groups):
        for step, group in enumerate(groups):
            table[epoch, step, : len(group)] = group
    return table
