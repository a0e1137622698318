"""Start-up: seconds to import, compile and take the first step, cold and warm with the persistent compilation cache.

Every measurement is a fresh process: "cold" with an empty cache folder, "warm" right after it with the same folder.

    python -m benchmarks.bench_compile [--smoke] [--methods student mkd] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import common

METHODS = ("student", "mkd")
PHASES = ("import", "init", "compile", "first_step", "total")
FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "slides_per_step": 16,
    "step_patches": 16_384, "chunk": 512, "compute_dtype": "float32", "methods": list(METHODS), "repeats": 3,
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "slides_per_step": 4,
    "step_patches": 256, "chunk": 64, "compute_dtype": "float32", "methods": ["student"], "repeats": 1,
}  # fmt: skip


def cell(config: Mapping[str, Any], method: str, cache: pathlib.Path) -> dict[str, Any]:
    """Seconds of every phase of one start, and whether the step came from the cache; run in a fresh process."""
    times = [time.perf_counter()]
    import jax

    from benchmarks import bench_collectives, bench_step
    from histokd_jax.train import cache as compile_cache

    times.append(time.perf_counter())
    hits = []
    jax.monitoring.register_event_listener(
        lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None
    )
    compile_cache.enable(cache)
    batch = bench_collectives.make_batch({**config, "method": method}, 1, config["step_patches"])
    built = bench_step.build_method(method, config["compute_dtype"], config)
    device = jax.devices()[0]
    train = bench_step.Trainer(built, batch)
    times.append(time.perf_counter())
    jax.block_until_ready(train(train.put(batch)))
    times.append(time.perf_counter())
    imported, made, stepped = (b - a for a, b in zip(times, times[1:]))
    return {
        "import": imported,
        # Parameters, batch and the programs that make them; the step itself apart.
        "init": made - train.compile_seconds,
        "compile": train.compile_seconds,
        "first_step": stepped,
        "total": times[-1] - times[0],
        "cache_hits": len(hits),
        "device_kind": device.device_kind,
    }


def run_cell(config: Mapping[str, Any], method: str, cache: str) -> dict[str, Any]:
    """`cell` in a fresh process.

    Raises:
      RuntimeError: if the process fails, with the end of its error output.
    """
    command = [sys.executable, "-m", "benchmarks.bench_compile", "--cell", method, "--cache", cache]
    command += ["--settings", json.dumps(dict(config))]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method}: exit {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Starts every method cold and warm, in turn, and writes the result."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for _ in range(config["repeats"]):
        for method in config["methods"]:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    seen.setdefault(f"{method}/{kind}", []).append(run_cell(config, method, cache))
    metrics = {
        f"{name}/{phase}": common.metric([one[phase] for one in cells], "s")
        for name, cells in seen.items()
        for phase in PHASES
    }
    derived: dict[str, Any] = {"smoke": args.smoke}
    for method in config["methods"]:
        cold, warm = (metrics[f"{method}/{kind}/compile"]["median"] for kind in ("cold", "warm"))
        hits = {kind: [one["cache_hits"] for one in seen[f"{method}/{kind}"]] for kind in ("cold", "warm")}
        derived[method] = {"warm_over_cold": warm / cold, "cache_hits": hits}
    notes = (
        "Fresh process per measurement. compile: lowering and compilation of the training step; warm finds it in the "
        "persistent cache that the cold start filled. init: device, parameters, batch. import: libraries."
    )
    return common.write_result(
        _target(args),
        benchmark="bench_compile",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(seen[f"{config['methods'][0]}/cold"][0]["device_kind"], 1),
    )


def _target(args: argparse.Namespace) -> pathlib.Path | None:
    if args.out is None and args.smoke:  # never among the results
        return pathlib.Path(tempfile.mkdtemp()) / "bench_compile.json"
    return args.out


def main() -> None:
    """Command line; --cell is the entry of one fresh process."""
    arguments = common.parser("bench_compile", __doc__.splitlines()[0])
    arguments.add_argument("--methods", nargs="+", choices=METHODS, help="what to start")
    arguments.add_argument("--cell", choices=METHODS, help="start one method and print JSON")
    arguments.add_argument("--cache", type=pathlib.Path, help="cache folder of --cell")
    arguments.add_argument("--settings", type=json.loads, help="configuration of --cell")
    args = arguments.parse_args()
    if args.cell is not None:
        print(json.dumps(cell(args.settings, args.cell, args.cache)))
        return
    config = dict(SMOKE if args.smoke else FULL)
    if args.methods is not None:
        config["methods"] = args.methods
    run(config, args)


if __name__ == "__main__":
    main()
