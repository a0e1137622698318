"""Training from disk against training from a cohort in device memory: speed end to end, host bytes, memory.

Bags of noise (log-normal sizes, fp16) lie in ArrayRecord shards, hot in the page cache. Each side trains whole epochs
of the same plan with the same compiled step in the order of work of the train loop; the sides take turns. `stream`
reads every step, `resident` gathers it on the device, `resident_int8` from 8-bit patches. Loading the cohort is timed
apart: it happens once per run.

    python -m benchmarks.bench_resident [--smoke] [--methods student mkd] [--median 1000] [--slides 320] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from benchmarks import bench_e2e, bench_step, common
from data_pipelines.pipeline import StepIterator, StepSource
from histokd_jax.train import feed, resident, sharding

METHODS = ("student", "mkd")
STREAM, RESIDENT, INT8 = "stream", "resident", "resident_int8"
SIDES = (STREAM, RESIDENT, INT8)
# What resident training must reach, against streaming in the same round.
CPU_TARGET, GPU_TARGET, GPU_INPUT_BOUND, HOST_BYTES_TARGET = 0.98, 5.0, 0.8, 0.01
FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "slides": 320,
    "median_patches": 1000, "sigma": 0.8, "slides_per_step": 16, "chunk": 512, "row_multiple": 128, "threads": 2,
    "repeats": 7, "compute_dtype": "float32", "methods": list(METHODS), "sides": list(SIDES),
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "slides": 24,
    "median_patches": 40, "sigma": 0.8, "slides_per_step": 4, "chunk": 64, "row_multiple": 64, "threads": 2,
    "repeats": 2, "compute_dtype": "float32", "methods": list(METHODS), "sides": list(SIDES),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """One way to feed the steps.

    Attributes:
      feeder: gives the batches.
      facts: what loading cost, and the memory it takes.
    """

    feeder: feed.Feeder
    facts: Mapping[str, Any]


def make_side(name: str, source: StepSource, threads: int) -> Side:
    """A feeder; the cohort of a resident one is loaded here, under the clock."""
    mesh = sharding.make_mesh(1)
    if name == STREAM:
        return Side(feed.StreamFeeder(mesh, threads), {})
    dtype = resident.INT8 if name == INT8 else resident.STORED
    plan, cache = resident.ResidentPlan(mesh, [source], dtype), resident.CohortCache()
    began = time.perf_counter()
    jax.block_until_ready(cache.get(plan, threads))
    seconds, estimate = time.perf_counter() - began, plan.estimate(None)
    facts = {
        "load_seconds": seconds,
        "load_mb_per_s": estimate.patches * source.reader.manifest.feat_dim * 2 / 1e6 / seconds,
        "cohort_mib": estimate.cohort_bytes / 2**20,
        "tables_mib": estimate.table_bytes / 2**20,
        "batches_mib": estimate.batch_bytes / 2**20,
    }
    if dtype == resident.INT8:
        facts["quantisation_error"] = resident.quantisation_error(plan.reader, plan.layout)
    return Side(feed.ResidentFeeder(plan, threads, cache), facts)


def epoch(train: bench_step.Trainer, side: Side, source: StepSource) -> Callable[[], dict[str, float]]:
    """A function that trains one epoch, start-up of the readers included.

    It returns valid patches per second, seconds per step in total and waiting for the next batch, and the bytes per
    step that the host sent.
    """

    def run() -> dict[str, float]:
        began, waited, patches, sent, loss = time.perf_counter(), 0.0, 0, 0, None
        batches = side.feeder.train(source)
        for _ in range(source.num_steps):
            asked = time.perf_counter()
            fed = next(batches)
            waited += time.perf_counter() - asked
            jax.block_until_ready(loss)
            loss = train(fed.batch)
            patches, sent = patches + fed.patches, sent + fed.host_bytes
        jax.block_until_ready(loss)
        seconds = time.perf_counter() - began
        return {
            "rate": patches / seconds,
            "step": seconds / source.num_steps,
            "data_wait": waited / source.num_steps,
            "host_bytes": sent / source.num_steps,
        }

    return run


def measure(source: StepSource, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains every method from every side, in turn.

    Returns:
      (metrics, derived).
    """
    sides = {name: make_side(name, source, config["threads"]) for name in config["sides"]}
    example = next(StepIterator(source, num_threads=0))
    metrics, derived = {}, {"plan": source.plan.report(), "sides": {k: dict(v.facts) for k, v in sides.items()}}
    for method in config["methods"]:
        train = bench_step.Trainer(bench_step.build_method(method, config["compute_dtype"], config), example)
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        runs = {}
        for name, side in sides.items():
            runs[name] = recorded(epoch(train, side, source), seen[name])
        common.alternate(runs, 1)  # compiles, and warms caches, buffers and threads
        for found in seen.values():
            found.clear()
        common.alternate(runs, config["repeats"])
        for name, found in seen.items():
            for key, unit in (("rate", "valid patches/s"), ("step", "s"), ("data_wait", "s"), ("host_bytes", "bytes")):
                metrics[f"{method}/{name}/{key}"] = common.metric([run[key] for run in found], unit)
        derived[method] = compare(seen, train, sides)
    peaks = jax.devices()[0].memory_stats() or {}
    derived["peak_device_mib"] = peaks["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in peaks else None
    return metrics, derived


def recorded(one: Callable[[], dict[str, float]], found: list[dict[str, float]]) -> Callable[[], float]:
    """A function that appends what `one` measures to `found` and returns the rate."""

    def run() -> float:
        found.append(one())
        return found[-1]["rate"]

    return run


def compare(
    seen: Mapping[str, list[dict[str, float]]], train: bench_step.Trainer, sides: Mapping[str, Side]
) -> dict[str, Any]:
    """Input-bound fractions, memory of a step with its data, and the verdicts of one method."""
    out: dict[str, Any] = {"step_temp_mib": train.temp_mib, "step_argument_mib": train.argument_mib}
    for name, found in seen.items():
        waits = [run["data_wait"] / run["step"] for run in found]
        out[f"{name}/input_bound_fraction"] = float(np.median(waits))
        # The arguments of the step hold one batch; a resident feeder keeps a second one.
        facts = sides[name].facts
        resident_mib = facts.get("cohort_mib", 0) + facts.get("tables_mib", 0) + facts.get("batches_mib", 0) / 2
        out[f"{name}/memory_mib"] = resident_mib + train.temp_mib + train.argument_mib
    if STREAM in seen:
        bound = out[f"{STREAM}/input_bound_fraction"]
        for name in set(seen) - {STREAM}:
            ratios = [a["rate"] / b["rate"] for a, b in zip(seen[name], seen[STREAM], strict=True)]
            sent = seen[name][0]["host_bytes"] / seen[STREAM][0]["host_bytes"]
            out[name] = {
                "speed_over_stream": float(np.median(ratios)),
                "ratios": ratios,
                "host_bytes_over_stream": sent,
                "meets_host_bytes_target": sent <= HOST_BYTES_TARGET,
                **verdict(float(np.median(ratios)), bound, jax.default_backend()),
            }
    return out


def verdict(ratio: float, stream_input_bound: float, backend: str) -> dict[str, Any]:
    """Whether resident training is as fast as asked for; {} on an accelerator where streaming is not input-bound."""
    if backend == "cpu":
        return {"speed_target": CPU_TARGET, "meets_speed_target": ratio >= CPU_TARGET}
    if stream_input_bound >= GPU_INPUT_BOUND:
        return {"speed_target": GPU_TARGET, "meets_speed_target": ratio >= GPU_TARGET}
    return {}


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Writes the data set, measures, writes the result."""
    sizes = common.log_normal_sizes(config["slides"], config["median_patches"], config["sigma"], bench_step.SEED)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "bags"
        common.write_bags(directory, sizes, config["feat_dim"])
        metrics, derived = measure(bench_e2e.open_source(directory, config), config)
    derived |= {"smoke": args.smoke, "dataset_mb": float(sizes.sum() * config["feat_dim"] * 2 / 1e6)}
    notes = (
        "Simulated bags of noise, page cache hot. Speed ratio: median over rounds of resident / streaming. host_bytes "
        "counts every array of a batch. memory_mib: cohort, tables, batches, and the step by its memory analysis."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_resident"),
        benchmark="bench_resident",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line."""
    # Grain's workers read absl flags, which nobody parses here.
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.WARNING)
    arguments = common.parser("bench_resident", __doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", choices=METHODS, help="what to train")
    arguments.add_argument("--sides", nargs="+", choices=SIDES, help="how to feed it")
    arguments.add_argument("--median", dest="median_patches", type=int, help="median bag size")
    arguments.add_argument("--slides", type=int, help="number of bags")
    arguments.add_argument("--threads", type=int, help="reader threads")
    arguments.add_argument("--chunk", type=int, help="patches per chunk of the attention pool")
    arguments.add_argument("--repeats", type=int, help="rounds")
    arguments.add_argument("--compute-dtype", choices=("float32", "bfloat16"), help="dtype of the products")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    keys = ("methods", "sides", "median_patches", "slides", "threads", "chunk", "repeats", "compute_dtype")
    config |= {k: v for k in keys if (v := getattr(args, k)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
