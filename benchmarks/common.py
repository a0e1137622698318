"""What every benchmark shares: one JSON schema, interleaved timing, simulated bags."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

SCHEMA = 1
ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy", "torch")
FIELDS = (
    "schema", "benchmark", "git", "timestamp", "host", "device_kind", "n_devices", "versions", "config", "metrics",
    "derived", "notes",
)  # fmt: skip
METRIC_FIELDS = ("median", "p10", "p90", "n", "unit")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""glibc settings that keep large buffers from being mapped and unmapped for every read."""


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """Argument parser with the options of every benchmark.

    Args:
      name: benchmark name; the default result is benchmarks/results/<name>.json.
      description: shown by --help.

    Returns:
      A parser with --smoke (seconds on a CPU; checks that it runs, its numbers mean nothing) and --out.
    """
    result = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    result.add_argument("--smoke", action="store_true", help="tiny sizes; the numbers mean nothing")
    result.add_argument("--out", type=pathlib.Path, default=None, help=f"default benchmarks/results/{name}.json")
    return result


def alternate(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measures all sides in turn, so that a change of the machine's load meets each of them alike.

    Args:
      sides: name -> function that runs once and returns one value.
      repeats: rounds; the starting side rotates from round to round.

    Returns:
      name -> values of all rounds.
    """
    names, values = list(sides), {name: [] for name in sides}
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            values[name].append(float(sides[name]()))
    return values


def metric(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Summary of repeated measurements.

    Args:
      values: at least one finite value.
      unit: e.g. "MB/s" (10^6 bytes).

    Returns:
      {median, p10, p90, n, unit}.

    Raises:
      ValueError: if there is no value or one is not finite.
    """
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"measurements are {list(values)}; expected at least one, all finite")
    p10, median, p90 = (float(np.percentile(values, q)) for q in (10, 50, 90))
    return {"median": median, "p10": p10, "p90": p90, "n": len(values), "unit": unit}


def write_result(
    path: str | os.PathLike[str] | None,
    *,
    benchmark: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    derived: Mapping[str, Any],
    notes: str = "",
    devices: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Writes one result in the common schema and prints it.

    Args:
      path: target file; None for benchmarks/results/<benchmark>.json.
      benchmark: name.
      config: what was run.
      metrics: name -> `metric(...)`.
      derived: ratios and verdicts computed from the metrics.
      notes: one or two sentences for the reader of the numbers.
      devices: (device kind, number of devices); None where no accelerator backend was used.

    Returns:
      The written record.
    """
    kind, count = devices or ("cpu", 0)
    record = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "git": git_revision(),
        "timestamp": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": host(),
        "device_kind": kind,
        "n_devices": count,
        "versions": versions(),
        "config": dict(config),
        "metrics": dict(metrics),
        "derived": dict(derived),
        "notes": notes,
    }
    check_record(record)
    target = pathlib.Path(path) if path is not None else RESULTS / f"{benchmark}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2, allow_nan=False)
    target.write_text(text + "\n")
    print(text)
    return record


def check_record(record: Any) -> None:
    """Refuses anything that is not a result of the common schema.

    Args:
      record: a parsed JSON file.

    Raises:
      ValueError: naming what is absent, unknown or malformed.
    """
    if not isinstance(record, Mapping) or record.get("schema") != SCHEMA:
        raise ValueError(f"is not a benchmark result of schema {SCHEMA}: remove or rerun it")
    if set(record) != set(FIELDS):
        raise ValueError(f"has other keys than a benchmark result: {sorted(set(record) ^ set(FIELDS))} differ")
    if set(record["host"]) != {"cpu", "cores", "memory_gib"}:
        raise ValueError(f"host is {sorted(record['host'])}; expected cpu, cores and memory_gib")
    for name, found in record["metrics"].items():
        if set(found) != set(METRIC_FIELDS):
            raise ValueError(f"metric {name!r} has the keys {sorted(found)}; expected {METRIC_FIELDS}")
        low, middle, high = found["p10"], found["median"], found["p90"]
        if not (np.isfinite([low, middle, high]).all() and low <= middle <= high and found["n"] >= 1):
            raise ValueError(f"metric {name!r} is {found}; expected finite p10 <= median <= p90 of n >= 1 values")


def git_revision() -> str:
    """Short commit, with '+dirty' for uncommitted changes; 'unknown' outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def host() -> dict[str, Any]:
    """Processor model, usable cores and memory in GiB; nothing that identifies the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": _cpu_model(), "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def versions() -> dict[str, str]:
    """Python and the installed ones of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def log_normal_sizes(n: int, median: float, sigma: float, seed: int) -> np.ndarray:
    """[n] int64 bag sizes >= 1, log-normal with the given median and log standard deviation."""
    rng = np.random.default_rng(seed)
    return np.maximum(1, median * np.exp(sigma * rng.standard_normal(n))).astype(np.int64)


def write_bags(
    directory: str | os.PathLike[str], sizes: np.ndarray, feat_dim: int, chunk_patches: int | None = None
) -> None:
    """Writes a data set of random fp16 bags (contents do not matter to a benchmark of input or memory).

    Args:
      directory: target folder.
      sizes: [n] patches per bag.
      feat_dim: D.
      chunk_patches: patches per record; None for the default of the format.
    """
    from data_pipelines.writer import DatasetWriter

    pool = np.random.default_rng(0).standard_normal((8192, feat_dim)).astype(np.float16)
    facts = {"name": "benchmark", "simulated": True, "simulation": {"kind": "noise"}, "shard_bytes": 2**28}
    with DatasetWriter(directory, feat_dim=feat_dim, chunk_patches=chunk_patches, **facts) as writer:
        for i, size in enumerate(sizes):
            rows = (np.arange(size) + 37 * i) % len(pool)
            writer.add(f"slide{i:06d}", f"case{i:06d}", pool[rows], None)


def _cpu_model() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
