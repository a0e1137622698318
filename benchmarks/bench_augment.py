"""Augmentation on the device: time per image of every preset, and of each step of the More From Less pipeline.

Batches of uint8 images that lie in device memory; one compiled program per preset, as inside a training step. The time
of a step is that of a program with this step alone, its random numbers included.

    python -m benchmarks.bench_augment [--smoke] [--out FILE] [--sizes 224 256] [--presets mfl_faithful] ...
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from histokd_jax.ops.image import presets
from histokd_jax.ops.image.augment import augment
from histokd_jax.ops.image.pixels import standardise

PRESETS = ("mfl_faithful", "mfl_corrected", "geometric_only", "hmkd_faithful", "stain_jitter")
FULL = {"presets": list(PRESETS), "sizes": [224, 256], "batch": 32, "repeats": 7, "steps_of": "mfl_faithful"}
SMOKE = {"presets": list(PRESETS), "sizes": [16], "batch": 2, "repeats": 1, "steps_of": "hmkd_faithful"}


def simulate_images(batch: int, size: int) -> np.ndarray:
    """[B, size, size, 3] uint8; contents do not matter to the time."""
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)


def programs(config: Mapping[str, Any]) -> dict[str, Callable]:
    """name -> function of (key, example, images)."""
    pipelines = {name: presets.recipe(name).image for name in config["presets"]}
    pipelines |= {f"step {type(s).__name__}": (s,) for s in presets.recipe(config["steps_of"]).image}
    functions = {name: jax.jit(functools.partial(augment, pipeline=steps)) for name, steps in pipelines.items()}
    return functions | {"standardise": jax.jit(lambda key, example, images: standardise(images))}


def microseconds(function: Callable, key: jax.Array, example: jax.Array, images: jax.Array) -> float:
    """Time per image of one call."""
    start = time.perf_counter()
    jax.block_until_ready(function(key, example, images))
    return 1e6 * (time.perf_counter() - start) / len(images)


def temporary_mib(function: Callable, *arrays: jax.Array) -> float:
    """Temporaries of the compiled program."""
    return function.lower(*arrays).compile().memory_analysis().temp_size_in_bytes / 2**20


def measure(size: int, config: Mapping[str, Any]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(program -> microseconds per image of every round, preset -> MiB of temporaries)."""
    arrays = (jax.random.key(0), jnp.arange(config["batch"]), jnp.asarray(simulate_images(config["batch"], size)))
    functions = programs(config)
    for function in functions.values():
        jax.block_until_ready(function(*arrays))
    timed = {name: functools.partial(microseconds, function, *arrays) for name, function in functions.items()}
    memory = {name: temporary_mib(functions[name], *arrays) for name in config["presets"]}
    return common.alternate(timed, config["repeats"]), memory


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures all cells and writes the result."""
    metrics, memory, per_second = {}, {}, {}
    for size in config["sizes"]:
        found, temporary = measure(size, config)
        for name, values in found.items():
            metrics[f"{name} {size} px"] = common.metric(values, "us/image")
            per_second[f"{name} {size} px"] = 1e6 / float(np.median(values))
        memory |= {f"{name} {size} px": value for name, value in temporary.items()}
    out = args.out
    if args.smoke and out is None:  # never among the results
        out = pathlib.Path(tempfile.mkdtemp()) / "bench_augment.json"
    return common.write_result(
        out,
        benchmark="bench_augment",
        config=config,
        metrics=metrics,
        derived={"smoke": args.smoke, "images_per_second": per_second, "temporary_mib": memory},
        notes="One view per image. A program of one step reads and writes the batch; in a preset steps are fused.",
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line."""
    arguments = common.parser("bench_augment", __doc__.splitlines()[0])
    arguments.add_argument("--presets", nargs="+", choices=[n for n in presets.image_presets() if n != "none"])
    arguments.add_argument("--sizes", nargs="+", type=int, help="image sides in pixels")
    arguments.add_argument("--batch", type=int, help="images per call")
    arguments.add_argument("--repeats", type=int, help="rounds of the measurement")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    run(config | {k: v for k in config if (v := getattr(args, k, None)) is not None}, args)


if __name__ == "__main__":
    main()
