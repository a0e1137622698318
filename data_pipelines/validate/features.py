"""Statistics of the stored features in one pass: constant columns, saturation, odd scales, slides of equal content."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipelines.manifest import Manifest
from data_pipelines.reader import BagReader
from data_pipelines.validate.findings import ERROR, WARNING, Finding, some

_SATURATED = 0.99 * float(np.finfo(np.float16).max)
_ODD_SCALE = 10.0
_SEED = 20_240_601


@dataclasses.dataclass(frozen=True, eq=False)
class SlideStatistics:
    """One slide: sums over patches relative to a common origin, and a digest that ignores the order of patches.

    Attributes:
      n: patches.
      total, squares: [D] float64 sums of the values and of their squares, after subtraction of the origin.
      low, high: [D] extremes.
      saturated: values at the end of the float16 range.
      not_finite: values that are NaN or infinite.
      digest: equal for equal sets of patches.
    """

    n: int
    total: np.ndarray
    squares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    saturated: int
    not_finite: int
    digest: int


def slide_statistics(features: np.ndarray, origin: np.ndarray) -> SlideStatistics:
    """Statistics of one bag [n, D]; `origin` [D] float64 keeps the sums of squares accurate."""
    values = features.astype(np.float64)
    finite = np.isfinite(values)
    values = np.where(finite, values, origin)
    centred = values - origin
    return SlideStatistics(
        len(values),
        centred.sum(0),
        (centred**2).sum(0),
        values.min(0),
        values.max(0),
        int((np.abs(values) >= _SATURATED).sum()),
        int((~finite).sum()),
        content_digest(features),
    )


def content_digest(features: np.ndarray) -> int:
    """64-bit digest of a bag [n, D] that does not depend on the order of its patches.

    Slides with equal content are stored in different orders, since the order is seeded by the slide id.
    """
    words = np.ascontiguousarray(features).view(np.uint16).reshape(len(features), -1)
    weights = np.random.default_rng(_SEED).integers(0, 2**63, words.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    rows = (words.astype(np.uint64) + np.uint64(1)) @ weights
    rows = (rows ^ (rows >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return int(np.bitwise_xor(rows, rows >> np.uint64(29)).sum(dtype=np.uint64))


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
    origin = reader.read_bag(0)[0][0].astype(np.float64)

    def one(row: int) -> SlideStatistics:
        found = slide_statistics(reader.read_bag(row)[0], origin)
        progress(1)
        return found

    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(one, range(len(manifest.slides))))
    return _judge(manifest, parts, origin)


def _judge(
    manifest: Manifest, parts: Sequence[SlideStatistics], origin: np.ndarray
) -> tuple[dict[str, Any], list[Finding]]:
    n = sum(part.n for part in parts)
    shift = sum(part.total for part in parts) / n
    variance = np.maximum(sum(part.squares for part in parts) / n - shift**2, 0)
    low, high = np.min([part.low for part in parts], 0), np.max([part.high for part in parts], 0)
    constant = np.flatnonzero(low == high)
    facts = {
        "mean": float((shift + origin).mean()),
        "std": float(np.sqrt(variance).mean()),
        "smallest": float(low.min()),
        "largest": float(high.max()),
        "constant_dimensions": constant.tolist(),
        "saturated_values": sum(part.saturated for part in parts) if manifest.dtype == "float16" else 0,
        "values_not_finite": sum(part.not_finite for part in parts),
    }
    findings = _constant(constant, manifest.feat_dim) + _values(facts)
    facts["duplicates"], found = _duplicates(manifest, parts)
    odd = _odd_scale(manifest, parts, origin)
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


def _duplicates(manifest: Manifest, parts: Sequence[SlideStatistics]) -> tuple[list[list[str]], list[Finding]]:
    groups = collections.defaultdict(list)
    for slide, part in zip(manifest.slides, parts):
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


def _odd_scale(manifest: Manifest, parts: Sequence[SlideStatistics], origin: np.ndarray) -> list[str]:
    # Root mean square of the raw values: sum (c + o)^2 = sum c^2 + 2 o sum c + n o^2 for c = value - origin.
    squares = [(part.squares + 2 * origin * part.total + part.n * origin**2).sum() / part.n for part in parts]
    size = np.sqrt(np.maximum(squares, 0))
    middle = float(np.median(size))
    return [s.slide_id for s, x in zip(manifest.slides, size) if x > _ODD_SCALE * middle or x * _ODD_SCALE < middle]
