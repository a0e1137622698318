"""Where the time of a training step goes: the operations with most self time in a profiler trace, as JSON.

A few steps after warm-up are traced with `jax.profiler` and the trace file is parsed in this process. On a GPU the
entries are kernels, on a CPU the operations of the compiled program.

    python -m benchmarks.bench_profile [--smoke] [--methods student mkd] [--median 1000] [--out FILE]
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks import bench_step, common

METHODS = ("student", "mkd")
FULL = {
    **{k: bench_step.FULL[k] for k in bench_step.SMOKE if k not in ("medians", "sides", "repeats")},
    "median": 1000, "methods": list(METHODS), "sides": ["student", "mkd"], "dtype": "float32", "steps": 5, "top": 15,
}  # fmt: skip
SMOKE = {
    **{k: bench_step.SMOKE[k] for k in bench_step.SMOKE if k not in ("medians", "sides", "repeats")},
    "median": 20, "methods": ["student"], "sides": ["student"], "dtype": "float32", "steps": 2, "top": 5,
}  # fmt: skip


class Event(NamedTuple):
    """One interval of a trace line."""

    name: str
    start_ns: float
    duration_ns: float


def self_times(events: Iterable[Event]) -> dict[str, tuple[float, int]]:
    """Time of every operation without the operations inside it.

    Args:
      events: of one line; intervals nest or are disjoint.

    Returns:
      name -> (nanoseconds, count).
    """
    own: dict[str, float] = collections.defaultdict(float)
    count: collections.Counter[str] = collections.Counter()
    open_events: list[Event] = []
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        while open_events and open_events[-1].start_ns + open_events[-1].duration_ns <= event.start_ns:
            open_events.pop()
        if open_events:
            own[open_events[-1].name] -= event.duration_ns
        own[event.name] += event.duration_ns
        count[event.name] += 1
        open_events.append(event)
    return {name: (max(0.0, nanoseconds), count[name]) for name, nanoseconds in own.items()}


def kernel_name(name: str) -> str:
    """The name of an operation without its running number, so that equal kernels are added up."""
    return re.sub(r"\.\d+$", "", name)


def read_trace(folder: pathlib.Path) -> tuple[dict[str, tuple[float, int]], str]:
    """Self times of the newest trace below a folder.

    Args:
      folder: what `jax.profiler.start_trace` was given.

    Returns:
      (name -> (nanoseconds, count), "device" or "host").

    Raises:
      ValueError: if there is no trace or it holds no operation.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"no *.xplane.pb below {folder.name}: the profiler wrote no trace")
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and list(plane.lines)]
    total: dict[str, tuple[float, int]] = {}
    for plane in devices or planes:
        for line in plane.lines:
            for name, (nanoseconds, count) in self_times(_operations(line, bool(devices))).items():
                name = kernel_name(name)
                before = total.get(name, (0.0, 0))
                total[name] = (before[0] + nanoseconds, before[1] + count)
    if not total:
        raise ValueError("the trace holds no operation of a compiled program")
    return total, "device" if devices else "host"


def _operations(line: Any, on_device: bool) -> list[Event]:
    if on_device:
        # GPU kernels lie on streams, TPU operations on "XLA Ops"; other lines summarise the same time again.
        if not line.name.startswith(("Stream", "XLA Ops")):
            return []
        return [Event(e.name, e.start_ns, e.duration_ns) for e in line.events]
    # On a CPU, operations of a program are marked with "hlo_op"; everything else is the runtime.
    return [Event(e.name, e.start_ns, e.duration_ns) for e in line.events if any(k == "hlo_op" for k, _ in e.stats)]


def top_operations(times: Mapping[str, tuple[float, int]], steps: int, top: int) -> list[dict[str, Any]]:
    """The operations with most self time, largest first, with their share of all operations."""
    whole = sum(nanoseconds for nanoseconds, _ in times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1][0])[:top]
    return [
        {"name": name[:120], "ms_per_step": ns / 1e6 / steps, "calls_per_step": count / steps, "share": ns / whole}
        for name, (ns, count) in ordered
    ]


def profile(method: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, derived) of one method."""
    patches = "float32" if config["dtype"] == "float32" else "bfloat16"
    side = method if config["dtype"] == "float32" else f"{method}_bfloat16_input"
    work = bench_step.make_workload({**config, "sides": [side]}, config["median"])
    hosts = work.batches[patches]
    train = bench_step.Trainer(bench_step.build_method(method, config["dtype"], config), hosts[0])
    batch = train.put(hosts[0])
    for _ in range(bench_step.WARM_UP):
        jax.block_until_ready(train(batch))
    rate = bench_step.window(train, [batch], work.patches[:1], config["steps"])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(config["steps"]):
                loss = train(batch)
            jax.block_until_ready(loss)
        times, where = read_trace(pathlib.Path(folder))
    busy = sum(nanoseconds for nanoseconds, _ in times.values()) / 1e6 / config["steps"]
    step_ms = work.patches[0] / rate * 1e3
    metrics = {
        f"{method}/step": common.metric([step_ms], "ms"),
        f"{method}/operations": common.metric([busy], "ms"),
    }
    found = {
        "where": where,
        "operations_over_step": busy / step_ms,
        "top": top_operations(times, config["steps"], config["top"]),
    }
    return metrics, found


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Traces every method and writes the result."""
    metrics, derived = {}, {"smoke": args.smoke}
    for method in config["methods"]:
        found, derived[method] = profile(method, config)
        metrics.update(found)
    notes = (
        "step: without the profiler; operations: sum of self times per traced step over all threads or streams (above "
        "the step where they run side by side, below it where the device waits)."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_profile"),
        benchmark="bench_profile",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line."""
    arguments = common.parser("bench_profile", __doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", choices=METHODS, help="what to trace")
    arguments.add_argument("--median", type=int, help="median bag size")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of patches and products")
    arguments.add_argument("--chunk", type=int, help="patches per chunk of the attention pool")
    arguments.add_argument("--slides-per-step", type=int, help="b")
    arguments.add_argument("--resident-gb", type=float, help="10^9 bytes for the resident bags")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    given = ("methods", "median", "dtype", "chunk", "slides_per_step", "resident_gb")
    config |= {k: v for k in given if (v := getattr(args, k)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
