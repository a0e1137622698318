"""The pooling kernels: network x implementation x patch width x bag length x dtype, forward and with gradients.

One bag per step. Reports patches per second, time per patch against the length of the bag (cost must grow linearly),
temporary memory of the compiled program, and the peak of a fresh process that takes one step on the longest bag.

    python -m benchmarks.bench_pooling [--smoke] [--out FILE] [--networks attention] [--chunks 512 4096] ...
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from histokd_jax.nn.coattention import CoAttention, ProjectedPatches
from histokd_jax.nn.gated_attention import BagEncoder, Bags, PatchFeatures

ATTENTION, COATTENTION = "attention", "coattention"
NETWORKS = (ATTENTION, COATTENTION)
DTYPES = ("float32", "float16", "bfloat16")
FORWARD, TRAIN = "forward", "forward+backward"
TEMPORARY_LIMIT_GIB, PEAK_LIMIT_GIB = 1.0, 1.5
FULL = {
    "networks": list(NETWORKS), "impls": ["chunked", "segment"], "chunks": [512], "widths": [1024],
    "lengths": [1_000, 10_000, 100_000, 1_000_000], "dtypes": list(DTYPES), "compute": "float32", "width": 256,
    "hidden": 128, "queries": 6, "window_patches": 200_000, "repeats": 3, "max_gib": 8.0, "peak_patches": 1_000_000,
}  # fmt: skip
SMOKE = {
    "networks": list(NETWORKS), "impls": ["chunked", "segment"], "chunks": [64], "widths": [32],
    "lengths": [100, 400], "dtypes": ["float16"], "compute": "float32", "width": 16, "hidden": 8, "queries": 3,
    "window_patches": 400, "repeats": 1, "max_gib": 1.0, "peak_patches": 4_000,
}  # fmt: skip


def padded(patches: int, chunk: int) -> int:
    """Patches rounded up to whole chunks, as the host does it."""
    return -(-patches // chunk) * chunk


def network(name: str, impl: str, chunk: int, feat_dim: int, config: Mapping[str, Any]) -> tuple[Any, tuple[int, ...]]:
    """The module of a cell, and the shape of its tokens (() without)."""
    dtype = jnp.bfloat16 if config["compute"] == "bfloat16" else None
    if name == ATTENTION:
        features = PatchFeatures(dtype=dtype)
        return BagEncoder(feat_dim, config["width"], config["hidden"], features, chunk=chunk, impl=impl), ()
    features = ProjectedPatches(dtype=dtype)
    module = CoAttention(feat_dim, config["width"], config["width"], features, chunk=chunk, impl=impl)
    return module, (1, config["queries"], config["width"])


def make_functions(module: Any, tokens: tuple[int, ...]) -> tuple[Callable, dict[str, Callable]]:
    """(initialiser, {FORWARD, TRAIN: function of (params, patches, segment_ids, positions)})."""

    def output(params, patches, segment_ids, positions):
        extra = (jnp.ones(tokens),) if tokens else ()
        return module.apply({"params": params}, Bags(patches, segment_ids, positions, 1), *extra)

    def init(key):
        ids = jnp.ones((1, 1), jnp.int32)
        extra = (jnp.ones(tokens),) if tokens else ()
        return module.init(key, Bags(jnp.zeros((1, 1, module.feat_dim)), ids, ids, 1), *extra)["params"]

    def loss(*args):
        return jnp.sum(output(*args) ** 2)

    return init, {FORWARD: output, TRAIN: jax.value_and_grad(loss)}


def shapes(length: int, feat_dim: int, dtype: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Patches, segment ids and positions of one bag."""
    index = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.ShapeDtypeStruct((1, length, feat_dim), jnp.dtype(dtype)), index, index


def compile_cell(function: Callable, init: Callable, inputs: Sequence[jax.ShapeDtypeStruct]) -> Any:
    """The compiled program; nothing is allocated for its input."""
    return jax.jit(function).lower(jax.eval_shape(init, jax.random.key(0)), *inputs).compile()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_input(patches: int, length: int, feat_dim: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A bag made on the device, one fused loop without temporaries; the patches beyond it are padding."""
    at = jax.lax.broadcasted_iota(jnp.int32, (1, length, feat_dim), 1)
    unit = jax.lax.broadcasted_iota(jnp.int32, (1, length, feat_dim), 2)
    values = ((at * 31 + unit * 17) % 1021).astype(jnp.float32) / 510.5 - 1.0
    index = jax.lax.broadcasted_iota(jnp.int32, (1, length), 1)
    return values.astype(dtype), (index < patches).astype(jnp.int32), index


def seconds_per_patch(compiled: Any, args: tuple, patches: int, window: int) -> float:
    """Mean time of one patch over at least `window` patches."""
    rounds = max(1, window // patches)
    start = time.perf_counter()
    for _ in range(rounds):
        result = compiled(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / (rounds * patches)


def variants(config: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(label, impl, chunk) of every implementation to compare."""
    out = []
    for impl in config["impls"]:
        for chunk in config["chunks"] if impl == "chunked" else config["chunks"][:1]:
            out.append((f"{impl}/{chunk}" if impl == "chunked" else impl, impl, chunk))
    return out


def measure(
    name: str, feat_dim: int, length: int, dtype: str, config: Mapping[str, Any]
) -> tuple[dict[str, Sequence[float]], dict[str, float], dict[str, str]]:
    """All implementations, forward and with gradients, in turn on one bag.

    Returns:
      (label -> ns per patch of every round, label -> MiB of temporaries, label -> why it was not run).
    """
    total = padded(length, max(config["chunks"]))
    args = None
    sides, temporary, skipped = {}, {}, {}
    for label, impl, chunk in variants(config):
        module, tokens = network(name, impl, chunk, feat_dim, config)
        init, functions = make_functions(module, tokens)
        for direction, function in functions.items():
            side = f"{label} {direction}"
            compiled = compile_cell(function, init, shapes(total, feat_dim, dtype))
            memory = compiled.memory_analysis()
            temporary[side] = memory.temp_size_in_bytes / 2**20
            needs = (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 2**30
            if needs > config["max_gib"]:
                skipped[side] = f"needs {needs:.1f} GiB, more than max_gib={config['max_gib']}"
                continue
            args = args or make_input(length, total, feat_dim, dtype)
            full = (jax.jit(init)(jax.random.key(0)), *args)
            jax.block_until_ready(compiled(*full))
            sides[side] = functools.partial(seconds_per_patch, compiled, full, length, config["window_patches"])
    values = common.alternate(sides, config["repeats"]) if sides else {}
    return {side: [1e9 * v for v in found] for side, found in values.items()}, temporary, skipped


def status_bytes(field: str) -> int:
    """A memory field of this process, e.g. VmRSS (present) or VmHWM (peak), in bytes.

    Unlike the record of the operating system for children, it does not start at what the parent process holds.
    """
    path = pathlib.Path("/proc/self/status")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def one_step(settings: Mapping[str, Any]) -> dict[str, int]:
    """Takes one training step on one large bag in this process and reports its memory.

    Args:
      settings: patches, feat_dim, dtype, chunk, network, and the keys width, hidden, queries, compute of the config.

    Returns:
      {"input_bytes", "before_bytes": resident before the step, "peak_bytes": peak of the process}.
    """
    module, tokens = network(settings["network"], "chunked", settings["chunk"], settings["feat_dim"], settings)
    init, functions = make_functions(module, tokens)
    length = padded(settings["patches"], settings["chunk"])
    compiled = compile_cell(functions[TRAIN], init, shapes(length, settings["feat_dim"], settings["dtype"]))
    params = jax.jit(init)(jax.random.key(0))
    inputs = make_input(settings["patches"], length, settings["feat_dim"], settings["dtype"])
    jax.block_until_ready((params, inputs))
    before = status_bytes("VmRSS")
    loss, grads = compiled(params, *inputs)
    norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))
    if not np.isfinite(float(loss)) or not 0 < norm < np.inf:
        raise RuntimeError(f"the step gave loss {float(loss)} and gradient norm {norm}; expected finite, not zero")
    return {
        "input_bytes": sum(x.nbytes for x in inputs),
        "before_bytes": before,
        "peak_bytes": status_bytes("VmHWM"),
    }


def one_step_in_fresh_process(settings: Mapping[str, Any]) -> dict[str, int]:
    """`one_step` in a process of its own.

    Raises:
      RuntimeError: if it fails, with the end of its error output.
    """
    command = [sys.executable, "-m", "benchmarks.bench_pooling", "--one-step", json.dumps(dict(settings))]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"one step failed with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak(config: Mapping[str, Any], dtype: str, name: str) -> dict[str, Any]:
    """Peak of one step on the longest bag, beyond its input."""
    keys = ("width", "hidden", "queries", "compute")
    settings = {key: config[key] for key in keys} | {
        "patches": config["peak_patches"], "feat_dim": max(config["widths"]), "dtype": dtype,
        "chunk": config["chunks"][0], "network": name,
    }  # fmt: skip
    found = one_step_in_fresh_process(settings)
    beyond = (found["peak_bytes"] - found["input_bytes"]) / 2**30
    return {
        "input_gib": found["input_bytes"] / 2**30,
        "peak_beyond_input_gib": beyond,
        "of_which_before_the_step_gib": (found["before_bytes"] - found["input_bytes"]) / 2**30,
        "limit_gib": PEAK_LIMIT_GIB,
        "holds": beyond < PEAK_LIMIT_GIB,
    }


def growth(per_patch: Mapping[int, float]) -> float:
    """Time per patch of the longest bag over that of the shortest: 1 for linear cost without overhead."""
    return per_patch[max(per_patch)] / per_patch[min(per_patch)]


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures all cells and writes the result."""
    # Before this process holds anything large.
    on_cpu = jax.default_backend() == "cpu"
    peaks = {f"{n} {d}": peak(config, d, n) for n in config["networks"] for d in config["dtypes"]} if on_cpu else {}
    metrics, temporary, skipped, curves = {}, {}, {}, {}
    for name in config["networks"]:
        for feat_dim in config["widths"]:
            for dtype in config["dtypes"]:
                for length in config["lengths"]:
                    found, memory, left_out = measure(name, feat_dim, length, dtype, config)
                    cell = f"{name} D={feat_dim} {dtype} n={length}"
                    for side, values in found.items():
                        metrics[f"{cell} {side}"] = common.metric([1e9 / v for v in values], "patches/s")
                        curve = curves.setdefault(f"{name} D={feat_dim} {dtype} {side}", {})
                        curve[length] = float(np.median(values))
                    temporary |= {f"{cell} {side}": value for side, value in memory.items()}
                    skipped |= {f"{cell} {side}": why for side, why in left_out.items()}
    chunked = {k: v for k, v in temporary.items() if " chunked/" in k}
    derived = {
        "smoke": args.smoke,
        "ns_per_patch": {key: {str(n): v for n, v in curve.items()} for key, curve in curves.items()},
        "longest_over_shortest": {key: growth(curve) for key, curve in curves.items() if len(curve) > 1},
        "temporary_mib": temporary,
        "chunked_temporary_below_limit": max(chunked.values(), default=0.0) < TEMPORARY_LIMIT_GIB * 1024,
        "peak_of_one_step": peaks or "not measured: the limit is for host memory, and the input lies on the device",
        "not_run": skipped,
    }
    notes = (
        "One bag per step; patches/s of valid patches; gradients in the parameters. Temporaries from the compiled "
        "program. Peak: resident set of a fresh process after one step, interpreter and compiler included."
    )
    out = args.out
    if args.smoke and out is None:  # never among the results
        out = pathlib.Path(tempfile.mkdtemp()) / "bench_pooling.json"
    return common.write_result(
        out,
        benchmark="bench_pooling",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line; --one-step is the entry of one fresh process."""
    arguments = common.parser("bench_pooling", __doc__.splitlines()[0])
    arguments.add_argument("--networks", nargs="+", choices=NETWORKS)
    arguments.add_argument("--impls", nargs="+", choices=("chunked", "segment"))
    arguments.add_argument("--chunks", nargs="+", type=int, help="patches per chunk")
    arguments.add_argument("--widths", nargs="+", type=int, help="patch-embedding widths")
    arguments.add_argument("--lengths", nargs="+", type=int, help="patches per bag")
    arguments.add_argument("--dtypes", nargs="+", choices=DTYPES, help="dtypes of the patches")
    arguments.add_argument("--compute", choices=("float32", "bfloat16"), help="dtype of the products")
    arguments.add_argument("--repeats", type=int, help="rounds")
    arguments.add_argument("--max-gib", type=float, help="cells that need more memory are compiled, not run")
    arguments.add_argument("--peak-patches", type=int, help="patches of the step whose peak memory is read")
    arguments.add_argument("--one-step", type=json.loads, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.one_step is not None:
        print(json.dumps(one_step(args.one_step)))
        return
    config = dict(SMOKE if args.smoke else FULL)
    config |= {k: v for k in config if (v := getattr(args, k, None)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
