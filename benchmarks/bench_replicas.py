"""Replicas: R trainings as one program against the same R trainings one after the other.

Folds x seeds of MKD on bags of noise in memory, each training on its own steps. `sequential` trains them in one process
with one compiled step; `one_program` trains them with a leading replica axis, batches stacked every step as
`histokd sweep` does. Both hand every batch to the device and wait for the step before. Compilation is outside the
clock; totals with it are derived: `sequential` compiles once, not once per run.

    python -m benchmarks.bench_replicas [--smoke] [--loop auto|map|vmap] [--devices N] [--out FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from benchmarks import bench_step, common
from configs import common as settings
from data_pipelines import schema
from data_pipelines.packing import PackPlan, PlanOptions, plan_coupled
from data_pipelines.pipeline import BatchAssembler, SlideTable, StepSource
from histokd_jax.train import replica_step, sharding
from histokd_jax.train.programs import Programs
from histokd_jax.train.state import init_params

# Wanted ratio of the time of one program to that of the sequential trainings, by platform.
TARGETS = {"cpu": 1.15, "gpu": 0.3}
FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "folds": 5, "seeds": 5,
    "slides": 80, "median": 100, "sigma": 0.8, "slides_per_step": 16, "chunk": 512, "row_multiple": 128, "steps": 5,
    "dtype": "float16", "compute_dtype": "float32", "repeats": 5, "loop": "auto", "devices": 1,
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "folds": 2, "seeds": 2,
    "slides": 12, "median": 20, "sigma": 0.8, "slides_per_step": 4, "chunk": 64, "row_multiple": 32, "steps": 2,
    "dtype": "float16", "compute_dtype": "float32", "repeats": 2, "loop": "auto", "devices": 1,
}  # fmt: skip


def make_batches(config: Mapping[str, Any]) -> tuple[list[list[dict[str, np.ndarray]]], PackPlan]:
    """([training][step] -> host batch, one of the plans); every training draws its own steps of the same shape."""
    sizes = common.log_normal_sizes(config["slides"], config["median"], config["sigma"], bench_step.SEED)
    table = SlideTable(np.arange(len(sizes)), bench_step.slot_fields(len(sizes), config["genes"]))
    reader = bench_step.NoiseReader(sizes, config["feat_dim"])
    plans = []
    for training in range(config["folds"] * config["seeds"]):
        options = PlanOptions(1, training, "uniform", multiple_of=config["row_multiple"], chunk_patches=1)
        plans.append(plan_coupled(sizes, None, options, slides_per_step=config["slides_per_step"]))
    longest = max(plans, key=lambda plan: plan.row_patches)
    batches = []
    for plan in plans:
        # As `replicas.align` does: equal row lengths.
        wide = PackPlan(**{**vars(plan), "row_patches": longest.row_patches})
        assemble = BatchAssembler(StepSource(reader, table, wide, config["dtype"]), slice(0, 1))
        # The assembler recycles its buffers.
        steps = [assemble(wide.step(0, i % wide.steps_per_epoch)) for i in range(config["steps"])]
        batches.append([{name: np.array(value) for name, value in step.items()} for step in steps])
    return batches, longest


def make_programs(config: Mapping[str, Any]) -> tuple[Programs, ConfigDict]:
    """The library's programs for MKD, and the settings they read."""
    cfg = settings.base()
    cfg.train.replica_loop = config["loop"]
    method = bench_step.build_method("mkd", config["compute_dtype"], config)
    return Programs(method, cfg, sharding.make_mesh(1)), cfg


class Sequential:
    """R trainings one after the other with one compiled step."""

    def __init__(self, programs: Programs, hosts: Sequence[Sequence[Mapping[str, np.ndarray]]]):
        self._programs, self._hosts = programs, hosts
        (self._stage,) = programs.method.stages
        self._example = sharding.put_batch(programs.mesh, hosts[0][0])
        began = time.perf_counter()
        self._train(hosts[0][:1], 0)
        self.compile_seconds = time.perf_counter() - began

    def _train(self, steps: Sequence[Mapping[str, np.ndarray]], seed: int) -> float:
        """Seconds of the steps of one training; its start is outside the clock."""
        params, extra, rng = init_params(self._programs.method, seed)
        state, loss = self._programs.start(self._stage, params, extra, rng, self._example), None
        jax.block_until_ready(state)
        began = time.perf_counter()
        for host in steps:
            batch = sharding.put_batch(self._programs.mesh, host)
            jax.block_until_ready(loss)
            state, loss = self._programs.train(self._stage, state, batch, 2e-4)
        if not np.isfinite(jax.device_get(loss)):
            raise RuntimeError("the loss of a training is not finite: the benchmark measures nothing")
        return time.perf_counter() - began

    def __call__(self) -> float:
        """Seconds of all trainings."""
        return sum(self._train(steps, seed) for seed, steps in enumerate(self._hosts))


class OneProgram:
    """The same trainings with a leading replica axis."""

    def __init__(self, programs: Programs, cfg: ConfigDict, hosts: Sequence[Sequence[Mapping]], devices: int):
        self._hosts, self._feed = hosts, programs.mesh
        (self._stage,) = programs.method.stages
        mesh = sharding.make_replica_mesh(devices)
        layout = replica_step.make_layout(range(len(hosts)), mesh.size)
        self._replicas = replica_step.ReplicaPrograms(programs, cfg, layout, mesh)
        starts = [init_params(programs.method, seed) for seed in range(len(hosts))]
        example = sharding.put_batch(programs.mesh, hosts[0][0])
        self._state = self._replicas.start(self._stage, starts, example, {})
        self.loop = self._replicas.loop
        began = time.perf_counter()
        self._train(1)
        self.compile_seconds = time.perf_counter() - began

    def _train(self, steps: int) -> None:
        count = len(self._hosts)
        rates, everyone, loss = np.full(count, 2e-4, np.float32), np.ones(count, bool), None
        for i in range(steps):
            fed = {r: sharding.put_batch(self._feed, host[i]) for r, host in enumerate(self._hosts)}
            batches = replica_step.stack_batches(self._replicas.layout, self._replicas.mesh, fed)
            jax.block_until_ready(loss)
            self._state, loss = self._replicas.train(self._stage, self._state, batches, rates, {}, everyone)
        if not np.isfinite(jax.device_get(loss)).all():
            raise RuntimeError("the loss of a training is not finite: the benchmark measures nothing")

    def __call__(self) -> float:
        """Seconds of all trainings."""
        began = time.perf_counter()
        self._train(len(self._hosts[0]))
        return time.perf_counter() - began


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures both sides in turn and writes the result."""
    hosts, plan = make_batches(config)
    sides = {"sequential": Sequential(make_programs(config)[0], hosts)}
    sides["one_program"] = OneProgram(*make_programs(config), hosts, config["devices"])
    common.alternate(sides, 1)  # warms caches and threads
    values = common.alternate(sides, config["repeats"])
    metrics = {name: common.metric(seen, "s") for name, seen in values.items()}
    metrics["ratio"] = common.metric(np.array(values["one_program"]) / np.array(values["sequential"]), "1")
    platform = jax.devices()[0].platform
    patches = sum(int(np.count_nonzero(step[schema.SEGMENT_IDS])) for steps in hosts for step in steps)
    median = {name: metrics[name]["median"] for name in sides}
    compiled = {name: side.compile_seconds for name, side in sides.items()}
    derived = {
        "smoke": args.smoke,
        "replicas": len(hosts),
        "loop": sides["one_program"].loop,
        "ratio_of_medians": median["one_program"] / median["sequential"],
        "target": TARGETS.get(platform),
        "patches_per_s": {name: patches / seconds for name, seconds in median.items()},
        "compile_and_first_step_seconds": compiled,
        "total_with_compilation_seconds": {name: compiled[name] + median[name] for name in sides},
        "plan": plan.report(),
    }
    if derived["target"]:
        derived["meets_target"] = derived["ratio_of_medians"] <= derived["target"]
    notes = (
        "Simulated bags of noise in memory; seconds for all trainings together, stacking and transfer included. "
        "Compilation includes the first step; the persistent cache is off."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_replicas"),
        benchmark="bench_replicas",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(jax.devices()[0].device_kind, config["devices"]),
    )


def main() -> None:
    """Command line."""
    logging.set_verbosity(logging.WARNING)
    arguments = common.parser("bench_replicas", __doc__.splitlines()[0])
    arguments.add_argument("--loop", choices=replica_step.LOOPS, help="loop over replicas (default: by backend)")
    arguments.add_argument("--devices", type=int, help="devices over which the replicas are divided")
    arguments.add_argument("--median", type=int, help="median patches per slide")
    arguments.add_argument("--compute-dtype", choices=("float32", "bfloat16"), help="dtype of the products")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    keys = ("loop", "devices", "median", "compute_dtype")
    config |= {key: value for key in keys if (value := getattr(args, key)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
