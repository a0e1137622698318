"""Training from disk: compute only, input only, and end to end, with the share of time that a step waits for data.

Bags of noise (log-normal sizes, fp16) lie in ArrayRecord shards. `compute` reuses one resident batch, `input` iterates
the pipeline without a device, `end_to_end` is the order of work of the train loop: next batch, transfer, wait for the
step before, dispatch. A run is input-bound if end to end is near input and below compute. The shards are in the page
cache, so this measures the software, not the disk.

    python -m benchmarks.bench_e2e [--smoke] [--threads 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from benchmarks import bench_step, common
from data_pipelines import schema
from data_pipelines.pipeline import SlideTable, StepIterator, StepSource
from data_pipelines.reader import BagReader

METHODS = ("student", "mkd")
FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "slides": 320,
    "median_patches": 1000, "sigma": 0.8, "slides_per_step": 16, "chunk": 512, "row_multiple": 128, "threads": 2,
    "repeats": 5, "compute_dtype": "float32", "methods": list(METHODS),
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "slides": 24,
    "median_patches": 40, "sigma": 0.8, "slides_per_step": 4, "chunk": 64, "row_multiple": 64, "threads": 2,
    "repeats": 2, "compute_dtype": "float32", "methods": list(METHODS),
}  # fmt: skip


def open_source(directory: pathlib.Path, config: dict[str, Any]) -> StepSource:
    """One epoch of packed steps of the data set, with labels and genes."""
    reader = BagReader(directory)
    sizes = reader.manifest.sizes
    plan = bench_step.make_plan(sizes, config, reader.manifest.chunk_patches)
    table = SlideTable(np.arange(len(sizes)), bench_step.slot_fields(len(sizes), config["genes"]))
    return StepSource(reader, table, plan)


def valid_patches(batch: dict[str, np.ndarray]) -> int:
    """Patches of a host batch without padding."""
    return int(np.count_nonzero(batch[schema.SEGMENT_IDS]))


def input_only(source: StepSource, threads: int) -> Callable[[], float]:
    """A function that reads one epoch, start-up included; valid patches/s."""

    def run() -> float:
        began, patches = time.perf_counter(), 0
        for batch in StepIterator(source, num_threads=threads):
            patches += valid_patches(batch)
        return patches / (time.perf_counter() - began)

    return run


def compute_only(train: bench_step.Trainer, source: StepSource) -> Callable[[], float]:
    """A function that takes as many steps as an epoch has on its first batch; valid patches/s."""
    host = next(StepIterator(source, num_threads=0))
    batch, patches = train.put(host), [valid_patches(host)]

    return lambda: bench_step.window(train, [batch], patches, source.num_steps)


def end_to_end(train: bench_step.Trainer, source: StepSource, threads: int) -> Callable[[], dict[str, float]]:
    """A function that trains one epoch from disk, start-up of the readers included.

    It returns valid patches per second and the seconds per step spent in total, waiting for data, handing the batch to
    the device, and waiting for the step before plus dispatching this one.
    """

    def run() -> dict[str, float]:
        batches, loss, patches = StepIterator(source, num_threads=threads), None, 0
        spent = {"data_wait": 0.0, "transfer": 0.0, "compute_wait": 0.0}
        began = time.perf_counter()
        for _ in range(source.num_steps):
            times = [time.perf_counter()]
            host = next(batches)
            times.append(time.perf_counter())
            batch = train.put(host)
            times.append(time.perf_counter())
            jax.block_until_ready(loss)
            loss = train(batch)
            times.append(time.perf_counter())
            patches += valid_patches(host)
            spent = {name: total + dt for (name, total), dt in zip(spent.items(), np.diff(times))}
        jax.block_until_ready(loss)
        seconds = time.perf_counter() - began
        return {
            "rate": patches / seconds,
            "step": seconds / source.num_steps,
            **{name: total / source.num_steps for name, total in spent.items()},
        }

    return run


def measure(
    source: StepSource, config: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, list[float]]]]:
    """Measures input and, per method, compute and the whole loop, in turn.

    Returns:
      (what compilation told per method, values: "input" and per method the rates and the seconds per step).
    """
    example, facts, sides = next(StepIterator(source, num_threads=0)), {}, {}
    details: dict[str, list[dict[str, float]]] = {name: [] for name in config["methods"]}
    sides["input"] = input_only(source, config["threads"])
    for name in config["methods"]:
        train = bench_step.Trainer(bench_step.build_method(name, config["compute_dtype"], config), example)
        facts[name] = {key: getattr(train, key) for key in ("compile_seconds", "temp_mib", "argument_mib")}
        sides[f"{name}/compute"] = compute_only(train, source)
        loop = end_to_end(train, source, config["threads"])
        sides[f"{name}/end_to_end"] = lambda loop=loop, name=name: (
            details[name].append(loop()) or details[name][-1]["rate"]
        )
    common.alternate(sides, 1)  # warms caches, buffers and threads
    for seen in details.values():
        seen.clear()
    values = common.alternate(sides, config["repeats"])
    seconds = {name: {key: [run[key] for run in seen] for key in seen[0]} for name, seen in details.items()}
    return facts, {"rates": values, **seconds}


def summarise(
    facts: dict[str, Any], values: dict[str, dict[str, list[float]]], source: StepSource
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, derived): rates, seconds per step, and per method the input-bound fraction."""
    metrics = {name: common.metric(v, "valid patches/s") for name, v in values["rates"].items()}
    derived: dict[str, Any] = {"plan": source.plan.report()}
    for name, compiled in facts.items():
        seen = values[name]
        for key in ("step", "data_wait", "transfer", "compute_wait"):
            metrics[f"{name}/seconds_{key}"] = common.metric(seen[key], "s/step")
        whole, compute, read = (metrics[key]["median"] for key in (f"{name}/end_to_end", f"{name}/compute", "input"))
        derived[name] = {
            **compiled,
            "input_bound_fraction": float(np.median(np.array(seen["data_wait"]) / np.array(seen["step"]))),
            "end_to_end_over_compute": whole / compute,
            "end_to_end_over_input": whole / read,
            "slides_per_s": source.plan.num_slots / metrics[f"{name}/seconds_step"]["median"],
        }
    return metrics, derived


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Writes the data set, measures, writes the result."""
    sizes = common.log_normal_sizes(config["slides"], config["median_patches"], config["sigma"], bench_step.SEED)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "bags"
        common.write_bags(directory, sizes, config["feat_dim"])
        source = open_source(directory, config)
        metrics, derived = summarise(*measure(source, config), source)
    derived |= {"smoke": args.smoke, "dataset_mb": float(sizes.sum() * config["feat_dim"] * 2 / 1e6)}
    notes = (
        "Simulated bags of noise, page cache hot. input_bound_fraction: median over epochs of seconds waiting for data "
        "/ seconds of the step, start-up of the readers included. Compute reuses the first batch of the plan."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_e2e"),
        benchmark="bench_e2e",
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
    arguments = common.parser("bench_e2e", __doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", choices=METHODS, help="what to train")
    arguments.add_argument("--threads", type=int, help="reader threads")
    arguments.add_argument("--compute-dtype", choices=("float32", "bfloat16"), help="dtype of the products")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    config |= {k: v for k in ("methods", "threads", "compute_dtype") if (v := getattr(args, k)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
