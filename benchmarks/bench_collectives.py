"""Communicated bytes of one MKD step, and its time at fixed total work, over 1, 2, 4, 8 devices.

Bytes come from the compiled program, at two lengths of bags, so that a growth with the bag would show. On CPU the
devices are simulated and share the cores: times then show the cost of dividing the same work, and say nothing about
weak scaling, which is measured on accelerators only. One fresh process per number of devices.

    python -m benchmarks.bench_collectives [--smoke] [--devices 1 2 4 8] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import bench_step, common, flops
from data_pipelines import schema
from histokd_jax.train import sharding
from histokd_jax.utils.hlo import collective_bytes

FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "method": "mkd",
    "slides_per_step": 16, "step_patches": 16_384, "chunk": 512, "devices": [1, 2, 4, 8], "compute_dtype": "float32",
    "window_steps": 5, "repeats": 5, "rounds": 1,
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "method": "student",
    "slides_per_step": 4, "step_patches": 512, "chunk": 32, "devices": [1, 2], "compute_dtype": "float32",
    "window_steps": 2, "repeats": 2, "rounds": 1,
}  # fmt: skip


def make_batch(config: Mapping[str, Any], rows: int, patches: int) -> dict[str, np.ndarray]:
    """One packed step of equal bags in `rows` rows.

    Args:
      config: widths and slides per step b.
      rows: R; divides `patches`.
      patches: valid patches; a multiple of b, so that the step is full.

    Raises:
      ValueError: if the patches cannot be divided.
    """
    slides = config["slides_per_step"]
    if patches % rows or patches % slides:
        raise ValueError(f"{patches} patches cannot be divided into {rows} rows and {slides} slides")
    rng, shape = np.random.default_rng(bench_step.SEED), (rows, patches // rows)
    ids, positions = np.divmod(np.arange(patches, dtype=np.int32), np.int32(patches // slides))
    return {
        schema.PATCHES: rng.standard_normal((*shape, config["feat_dim"]), np.float32),
        schema.SEGMENT_IDS: (ids + 1).reshape(shape),
        schema.POSITIONS: positions.reshape(shape),
        schema.WEIGHT: np.ones(slides, np.float32),
        schema.SLIDE_INDEX: np.arange(slides, dtype=np.int32),
        **{k: _as_stored(v) for k, v in bench_step.slot_fields(slides, config["genes"]).items()},
    }


def _as_stored(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int32) if values.dtype == np.int64 else values


def trainer(config: Mapping[str, Any], devices: int, patches: int) -> tuple[bench_step.Trainer, dict[str, Any]]:
    """A compiled step on a mesh of `devices`, and its batch on them."""
    batch = make_batch(config, devices, patches)
    method = bench_step.build_method(config["method"], config["compute_dtype"], config)
    train = bench_step.Trainer(method, batch, sharding.make_mesh(devices))
    return train, train.put(batch)


def cell(config: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """Bytes and seconds per step on `devices` devices; run in a fresh process that has them."""
    patches = config["step_patches"]
    train, batch = trainer(config, devices, patches)
    found = {str(patches): collective_bytes(train.compiled_text())}
    for _ in range(bench_step.WARM_UP):
        jax.block_until_ready(train(batch))
    steps = config["window_steps"]
    rates = [bench_step.window(train, [batch], [1], steps) for _ in range(config["repeats"])]
    half, _ = trainer(config, devices, patches // 2)
    found[str(patches // 2)] = collective_bytes(half.compiled_text())
    kind = jax.devices()[0].device_kind
    return {"bytes": found, "seconds": [1 / rate for rate in rates], "device_kind": kind}


def run_cell(config: Mapping[str, Any], devices: int) -> dict[str, Any]:
    """`cell` in a fresh process; a CPU is divided into as many simulated devices.

    Raises:
      RuntimeError: if the process fails, with the end of its error output.
    """
    command = [sys.executable, "-m", "benchmarks.bench_collectives", "--cell", str(devices)]
    command += ["--settings", json.dumps(dict(config))]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{devices} devices: exit {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def bound(config: Mapping[str, Any]) -> int:
    """Bytes that a step may communicate: gradients, and per slide the softmax state of two bag networks (H + 2 wide).

    The state is summed in float32 together with its normaliser and maximum. Nothing in it depends on the bag length.
    """
    state = 2 * config["slides_per_step"] * (config["model_d"] + 2)
    return 4 * (flops.parameters(flops.Widths.of(config), config["method"]) + state)


def summarise(config: Mapping[str, Any], cells: Mapping[int, list[dict[str, Any]]]) -> tuple[dict, dict]:
    """(metrics, derived) of the cells of every number of devices."""
    patches, half = str(config["step_patches"]), str(config["step_patches"] // 2)
    metrics, per_devices = {}, {}
    for devices, seen in cells.items():
        seconds = [s for one in seen for s in one["seconds"]]
        metrics[f"step[{devices} devices]"] = common.metric([s * 1e3 for s in seconds], "ms")
        found = seen[0]["bytes"]
        total = sum(found[patches].values())
        per_devices[str(devices)] = {
            "collective_bytes": found[patches],
            "total_bytes": total,
            "independent_of_bag_length": found[patches] == found[half],
            "within_bound": total <= bound(config),
        }
    one = metrics.get("step[1 devices]")
    if one:
        ratios = {str(n): metrics[f"step[{n} devices]"]["median"] / one["median"] for n in cells}
        per_devices["time_over_one_device"] = ratios
    return metrics, {"bound_bytes": bound(config), **per_devices}


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures all numbers of devices in turn and writes the result."""
    cells: dict[int, list[dict[str, Any]]] = {devices: [] for devices in config["devices"]}
    for _ in range(config["rounds"]):
        for devices, seen in cells.items():
            seen.append(run_cell(config, devices))
    metrics, derived = summarise(config, cells)
    kind = cells[config["devices"][0]][0]["device_kind"]
    simulated = kind == "cpu"
    derived |= {
        "smoke": args.smoke,
        "devices_simulated": simulated,
        "weak_scaling": "unmeasured: simulated devices share the cores" if simulated else "see time_over_one_device",
    }
    notes = (
        "Fixed total work, divided over the devices; one fresh process per number of devices. Bytes: results of all "
        "collectives of the compiled step. bound_bytes: parameters plus softmax state of the slides of a step."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_collectives"),
        benchmark="bench_collectives",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(kind, max(config["devices"])),
    )


def main() -> None:
    """Command line; --cell is the entry of one fresh process."""
    arguments = common.parser("bench_collectives", __doc__.splitlines()[0])
    arguments.add_argument("--devices", type=int, nargs="+", help="numbers of devices")
    arguments.add_argument("--cell", type=int, help="measure one number of devices and print JSON")
    arguments.add_argument("--settings", type=json.loads, help="configuration of --cell")
    args = arguments.parse_args()
    if args.cell is not None:
        # Only a CPU obeys; a machine with enough accelerators uses those.
        jax.config.update("jax_num_cpu_devices", args.cell)
        print(json.dumps(cell(args.settings, args.cell)))
        return
    config = dict(SMOKE if args.smoke else FULL)
    if args.devices is not None:
        config["devices"] = args.devices
    run(config, args)


if __name__ == "__main__":
    main()
