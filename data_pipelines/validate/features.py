"""Statistics of the stored features in one pass: constant columns, saturation, odd scales, slides of equal content."""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.manifest import Manifest
from data_pipelines.reader import BagReader
from data_pipelines.validate.findings import ERROR, WARNING, Finding, some

_SATURATED = 0.99 * float(np.finfo(np.float16).max)
_ODD_SCALE = 10.0
_SEED = 20_240_601
_BLOCK = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over patches relative to a common origin.

    Attributes:
      n: patches.
      total, squares: [D] float64 sums of the values and of their squares, after subtraction of the origin.
      low, high: [D] extremes.
      saturated: values at the end of the float16 range.
      not_finite: values that are NaN or infinite; they count as the origin.
    """

    n: int
    total: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    saturated: int
    not_finite: int

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.n + other.n,
            self.total + other.total,
            self.squares + other.squares,
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
            self.saturated + other.saturated,
            self.not_finite + other.not_finite,
        )

    def root_mean_square(self, origin: np.ndarray) -> float:
        """Of all values: sum (c + o)^2 = sum c^2 + 2 o sum c + n o^2 for c = value - origin."""
        squares = (self.squares + 2 * origin * self.total + self.n * origin**2).sum()
        return float(np.sqrt(max(squares, 0) / (self.n * len(origin))))


class SlideSummary(NamedTuple):
    """What is kept of a slide: patches, `content_digest`, root mean square of its values."""

    n: int
    digest: int
    size: float


def statistics(features: np.ndarray, origin: np.ndarray) -> Statistics:
    """Statistics of a bag [n, D]; `origin` [D] float64 keeps the sums of squares accurate."""
    blocks = [features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK)]
    return functools.reduce(operator.add, (_of_block(block, origin) for block in blocks))


def _of_block(features: np.ndarray, origin: np.ndarray) -> Statistics:
    values = features.astype(np.float64)
    finite = np.isfinite(values)
    values = np.where(finite, values, origin)
    saturated = int((np.abs(values) >= _SATURATED).sum())
    low, high = values.min(0), values.max(0)
    values -= origin
    return Statistics(len(values), values.sum(0), (values**2).sum(0), low, high, saturated, int((~finite).sum()))


def content_digest(features: np.ndarray) -> int:
    """64-bit digest of a bag [n, D] that does not depend on the order of its patches.

    Slides with equal content are stored in different orders, since the order is seeded by the slide id.
    """
    weights = np.random.default_rng(_SEED).integers(0, 2**63, features[0].nbytes // 2, np.uint64)
    weights = weights * np.uint64(2) + np.uint64(1)
    digest = np.uint64(0)
    for start in range(0, len(features), _BLOCK):
        words = np.ascontiguousarray(features[start : start + _BLOCK]).view(np.uint16)
        rows = (words.astype(np.uint64) + np.uint64(1)) @ weights
        rows = (rows ^ (rows >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        digest = np.bitwise_xor(rows, rows >> np.uint64(29)).sum(dtype=np.uint64, initial=digest)
    return int(digest)


def check_features(
    manifest: Manifest, *, threads: int = 2, progress: Callable[[int], None] = lambda count: None
) -> tuple[dict[str, Any], list[Finding]]:
    """Reads every patch once.

    Args:
      manifest: of the dataset.
      threads: that read.
      progress: called with 1 after every slide.

    Returns:
      Facts and findings.
    """
    reader = BagReader(manifest)
    origin = np.nan_to_num(reader.read_bag(0)[0][0].astype(np.float64), posinf=0.0, neginf=0.0)

    def one(row: int) -> tuple[Statistics, SlideSummary]:
        features = reader.read_bag(row)[0]
        found = statistics(features, origin)
        summary = SlideSummary(found.n, content_digest(features), found.root_mean_square(origin))
        progress(1)
        return found, summary

    whole, slides = None, []
    with ThreadPoolExecutor(threads) as pool:
        for found, summary in pool.map(one, range(len(manifest.slides))):
            whole = found if whole is None else whole + found
            slides.append(summary)
    return _judge(manifest, whole, slides, origin)


def _judge(
    manifest: Manifest, whole: Statistics, slides: Sequence[SlideSummary], origin: np.ndarray
) -> tuple[dict[str, Any], list[Finding]]:
    shift = whole.total / whole.n
    variance = np.maximum(whole.squares / whole.n - shift**2, 0)
    constant = np.flatnonzero(whole.low == whole.high)
    facts = {
        "mean": float((shift + origin).mean()),
        "std": float(np.sqrt(variance).mean()),
        "smallest": float(whole.low.min()),
        "largest": float(whole.high.max()),
        "constant_dimensions": constant.tolist(),
        "saturated_values": whole.saturated if manifest.dtype == "float16" else 0,
        "values_not_finite": whole.not_finite,
    }
    findings = _constant(constant, manifest.feat_dim) + _values(facts)
    facts["duplicates"], found = _duplicates(manifest, slides)
    odd = _odd_scale(manifest, slides)
    if odd:
        text = f"the values of {len(odd)} slides are more than {_ODD_SCALE:g} times larger or smaller than usual"
        hint = "another encoder or normalisation?"
        findings.append(Finding(WARNING, "scale", f"{text} ({some(odd)}): {hint}", tuple(odd)))
    return facts, findings + found


def _constant(constant: np.ndarray, width: int) -> list[Finding]:
    if not len(constant):
        return []
    names = tuple(map(str, constant))
    level = ERROR if len(constant) == width else WARNING
    text = f"{len(constant)} of {width} feature dimensions are constant over all slides ({some(names)})"
    return [Finding(level, "constant", text, names)]


def _values(facts: dict[str, Any]) -> list[Finding]:
    found = []
    if facts["values_not_finite"]:
        found.append(Finding(ERROR, "not_finite", f"{facts['values_not_finite']} values are NaN or infinite"))
    if facts["saturated_values"]:
        text = (
            f"{facts['saturated_values']} values lie at the end of the float16 range; store float32 (--dtype float32)"
        )
        found.append(Finding(WARNING, "saturation", text))
    return found


def _duplicates(manifest: Manifest, summaries: Sequence[SlideSummary]) -> tuple[list[list[str]], list[Finding]]:
    groups = collections.defaultdict(list)
    for slide, part in zip(manifest.slides, summaries):
        groups[part.n, part.digest].append(slide)
    twins = [group for group in groups.values() if len(group) > 1]
    findings = []
    for group in twins:
        cases = sorted({slide.case_id for slide in group})
        names = tuple(slide.slide_id for slide in group)
        if len(cases) > 1:
            text = f"slides {some(names)} of different patients ({some(cases)}) have equal features"
            findings.append(Finding(ERROR, "duplicates", text, names))
        else:
            text = f"slides {some(names)} of patient {cases[0]} have equal features"
            findings.append(Finding(WARNING, "duplicates", text, names))
    return [[slide.slide_id for slide in group] for group in twins], findings


def _odd_scale(manifest: Manifest, summaries: Sequence[SlideSummary]) -> list[str]:
    middle = float(np.median([part.size for part in summaries]))
    low, high = middle / _ODD_SCALE, middle * _ODD_SCALE
    return [slide.slide_id for slide, part in zip(manifest.slides, summaries) if not low <= part.size <= high]
