"""Which slides an epoch sees: draws that are pure functions of (seed, epoch), so that any epoch can be replayed."""

from __future__ import annotations

import enum

import numpy as np

SAMPLERS = ("class_balanced_replacement", "uniform")


class Stream(enum.IntEnum):
    """Independent random streams of one epoch; adding a consumer never shifts the numbers of another."""

    DRAW = 0
    GROUP = 1
    START = 2


def epoch_rng(seed: int, epoch: int, stream: Stream) -> np.random.Generator:
    """Generator of one stream of one epoch.

    Args:
      seed: seed of the run, >= 0.
      epoch: 0-based epoch.
      stream: what the numbers are for.

    Returns:
      A counter-based (Philox) generator keyed by (seed, epoch, stream).
    """
    key = np.random.SeedSequence(entropy=seed, spawn_key=(int(stream), epoch))
    return np.random.Generator(np.random.Philox(key))


def draw_epoch(
    sizes: np.ndarray,
    labels: np.ndarray | None,
    num_draws: int,
    *,
    sampler: str,
    stratified: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Slides of one epoch, in random order.

    `class_balanced_replacement` is the weighted sampler of the MKD specification (section 7): with replacement, weight
    n / n_class. `uniform` takes every slide at most once. Drawing `num_draws` slides has the same law as drawing n and
    discarding a trailing incomplete step, so a planner asks for exactly as many as its steps hold.

    Args:
      sizes: [n] int, patches per slide; orders the strata when `stratified`.
      labels: [n] int class of each slide; only read by `class_balanced_replacement`.
      num_draws: number of slides to draw; at most n for `uniform`.
      sampler: one of `SAMPLERS`.
      stratified: spread the draws evenly over the slides sorted by size. The expected count of every slide stays the
        same; class counts become exact (up to a random remainder) and the epoch's total size varies far less.
      rng: generator of `Stream.DRAW`.

    Returns:
      [num_draws] int64 indices into `sizes`.

    Raises:
      ValueError: on an unknown sampler, too many draws without replacement, or missing or malformed labels.
    """
    sizes = np.asarray(sizes)
    if sampler == "uniform":
        drawn = _without_replacement(sizes, num_draws, stratified, rng)
    elif sampler == "class_balanced_replacement":
        labels = _checked_labels(labels, len(sizes))
        counts = _class_counts(labels, num_draws, stratified, rng)
        pick = _stratified_replacement if stratified else _iid_replacement
        drawn = np.concatenate([pick(np.flatnonzero(labels == c), sizes, m, rng) for c, m in counts.items()])
    else:
        raise ValueError(f"train.sampler is {sampler!r}; expected one of {SAMPLERS}")
    return rng.permutation(drawn)


def _checked_labels(labels: np.ndarray | None, n: int) -> np.ndarray:
    if labels is None:
        raise ValueError("class_balanced_replacement needs one label per slide; got None: pass labels or use 'uniform'")
    labels = np.asarray(labels)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}{labels.shape}; expected integers of shape ({n},), one per slide")
    if (labels < 0).any():
        row = int(np.argmax(labels < 0))
        raise ValueError(
            f"label of slide {row} is {labels[row]}; expected >= 0: drop unlabelled slides before sampling"
        )
    return labels


def _class_counts(labels: np.ndarray, num_draws: int, exact: bool, rng: np.random.Generator) -> dict[int, int]:
    """Draws per class present: multinomial with equal weights, or equal up to a remainder given to random classes."""
    classes = np.unique(labels)
    if exact:
        counts = np.full(len(classes), num_draws // len(classes))
        counts[rng.permutation(len(classes))[: num_draws % len(classes)]] += 1
    else:
        counts = rng.multinomial(num_draws, np.full(len(classes), 1.0 / len(classes)))
    return {int(c): int(m) for c, m in zip(classes, counts)}


def _iid_replacement(members: np.ndarray, sizes: np.ndarray, m: int, rng: np.random.Generator) -> np.ndarray:
    return members[rng.integers(len(members), size=m)]


def _stratified_replacement(members: np.ndarray, sizes: np.ndarray, m: int, rng: np.random.Generator) -> np.ndarray:
    """One draw per stratum: the slides sorted by size, cut into m equal (fractional) strata; E[count] = m / n_class."""
    ordered = _sorted_by_size(members, sizes, rng)
    position = (np.arange(m) + rng.random(m)) * (len(members) / max(m, 1))
    return ordered[np.minimum(position.astype(np.int64), len(members) - 1)]


def _without_replacement(sizes: np.ndarray, m: int, stratified: bool, rng: np.random.Generator) -> np.ndarray:
    """m of n distinct slides; stratified: the n - m left out are a systematic sample over the sorted sizes."""
    n = len(sizes)
    if m > n:
        raise ValueError(f"cannot draw {m} slides without replacement from {n}: lower num_draws or use another sampler")
    if not stratified:
        return rng.permutation(n)[:m]
    ordered = _sorted_by_size(np.arange(n), sizes, rng)
    # One shared offset: the positions are at least one slide apart, so exactly n - m distinct slides are left out.
    left_out = np.floor((np.arange(n - m) + rng.random()) * (n / max(n - m, 1))).astype(np.int64)
    return np.delete(ordered, np.minimum(left_out, n - 1))


def _sorted_by_size(members: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Members by increasing size, equal sizes in random order (else manifest order would pair the same slides)."""
    shuffled = rng.permutation(members)
    return shuffled[np.argsort(sizes[shuffled], kind="stable")]
