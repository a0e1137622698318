"""A whole MKD experiment as one number: 5 folds on a simulated cohort in device memory, from command to summary.

Bags are noise, so the scores mean nothing; the work is that of a real run: `histokd train` with fixed epochs (no early
stopping, no control), bfloat16 products, `data.resident=on`.

    python -m benchmarks.bench_experiment [--smoke] [--slides 1000] [--median 10000] [--epochs 20] [--out FILE]

Exit code 3: it cannot run here, with the reason as the last line of the error output.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import bench_memory, common

CANNOT_RUN = 3
FULL = {
    "slides": 1000, "median_patches": 9560, "sigma": 0.3, "largest_bag": 40_000, "feat_dim": 1024, "genes": 8192,
    "token_size": 512, "folds": 5, "epochs": 20, "slides_per_step": 16, "chunk": 16_384, "row_multiple": 16_384,
    "compute_dtype": "bfloat16", "resident": "on", "threads": 8, "bootstrap": 200,
}  # fmt: skip
SMOKE = {
    "slides": 40, "median_patches": 20, "sigma": 0.3, "largest_bag": 100, "feat_dim": 32, "genes": 32,
    "token_size": 16, "folds": 2, "epochs": 1, "slides_per_step": 4, "chunk": 64, "row_multiple": 64,
    "compute_dtype": "float32", "resident": "on", "threads": 2, "bootstrap": 20,
}  # fmt: skip


def overrides(config: dict[str, Any], dataset: pathlib.Path) -> dict[str, Any]:
    """Settings of `histokd train`."""
    return {
        "data.dir": dataset,
        "data.feat_dim": 0,
        "data.resident": config["resident"],
        "data.chunk": config["chunk"],
        "data.row_multiple": config["row_multiple"],
        "data.threads": config["threads"],
        "genes.top_k": config["genes"],
        "genes.token_size": config["token_size"],
        "genes.ranking": "variance",
        "train.b": config["slides_per_step"],
        "train.max_epochs": config["epochs"],
        "train.compute_dtype": config["compute_dtype"],
        "early_stop.enabled": False,
        "ckpt.every_epochs": config["epochs"],
        "split.n_folds": config["folds"],
        "compare.control": False,
        "report.bootstrap": config["bootstrap"],
    }


def obstacle(config: dict[str, Any], folder: pathlib.Path) -> str:
    """Why the experiment cannot run here; empty if it can."""
    from histokd_jax.utils import config as config_utils

    known = config_utils.flatten(config_utils.load("configs/mkd.py:er", []))
    if "data.resident" not in known:
        return "this version has no data.resident: the cohort cannot be held in device memory"
    size = expected_bytes(config)
    free = shutil.disk_usage(folder).free
    if size * 1.1 > free:
        return f"the cohort takes {size / 1e9:.1f} GB on disk, {free / 1e9:.1f} GB are free: fewer --slides"
    memory = _device_bytes()
    if memory is not None and size > 0.8 * memory:
        return f"the cohort takes {size / 1e9:.1f} GB, the device has {memory / 1e9:.1f} GB: fewer --slides"
    return ""


def expected_bytes(config: dict[str, Any]) -> float:
    """Bytes of the patches in float16."""
    sizes = common.log_normal_sizes(config["slides"], config["median_patches"], config["sigma"], bench_memory.SEED)
    return float(np.minimum(sizes, config["largest_bag"]).sum()) * config["feat_dim"] * 2


def _device_bytes() -> float | None:
    # A child: this process must not hold the device while the training needs it.
    code = "import jax; s = jax.devices()[0].memory_stats(); print((s or {}).get('bytes_limit', 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return float(done.stdout.split()[-1]) or None if done.returncode == 0 else None


def device_kind() -> str:
    """Kind of the device that a run uses, asked in a child."""
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def epochs_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The training lines of every fold's metrics.jsonl."""
    lines = [
        json.loads(line)
        for path in sorted(workdir.glob("fold_*/metrics.jsonl"))
        for line in path.read_text().splitlines()
    ]
    return [line for line in lines if line.get("split") == "train"]


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Writes the cohort, trains, writes the result.

    Raises:
      SystemExit: with code 3 where it cannot run.
      RuntimeError: if the training fails, with the end of its error output.
    """
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        reason = obstacle(config, folder)
        if reason:
            print(reason, file=sys.stderr)
            raise SystemExit(CANNOT_RUN)
        began = time.perf_counter()
        bench_memory.write_cohort(folder / "cohort", config["slides"], config)
        wrote = time.perf_counter() - began
        command = [sys.executable, "-m", "histokd_jax.cli.main", "train", "--config", "configs/mkd.py:er,fold=all"]
        command += ["--workdir", str(folder / "run"), "--no-report"]
        command += [f"--config.{key}={value}" for key, value in overrides(config, folder / "cohort").items()]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"histokd train failed with {done.returncode}:\n{done.stderr[-4000:]}")
        epochs = epochs_of(folder / "run")
    metrics = {
        "experiment": common.metric([seconds], "s"),
        "epoch": common.metric([line["time_epoch"] for line in epochs], "s"),
        "training": common.metric([line["patches_per_second"] for line in epochs], "valid patches/s"),
    }
    return common.write_result(
        _target(args),
        benchmark="bench_experiment",
        config=config,
        metrics=metrics,
        derived={
            "smoke": args.smoke,
            "minutes": seconds / 60,
            "cohort_gb": expected_bytes(config) / 1e9,
            "seconds_to_write_cohort": wrote,
            "epochs_trained": len(epochs),
            "share_of_time_in_training_steps": sum(line["time_epoch"] for line in epochs) / seconds,
        },
        notes="Wall clock of the command: start, compilation, loading, training, evaluation, export. Noise bags.",
        devices=(device_kind(), 1),
    )


def _target(args: argparse.Namespace) -> pathlib.Path | None:
    if args.out is None and args.smoke:
        return pathlib.Path(tempfile.mkdtemp()) / "bench_experiment.json"
    return args.out


def main() -> None:
    """Command line."""
    arguments = common.parser("bench_experiment", __doc__.splitlines()[0])
    arguments.add_argument("--folder", type=pathlib.Path, help="where cohort and run go; default: temporary folder")
    arguments.add_argument("--slides", type=int, help="slides of the cohort")
    arguments.add_argument("--median", dest="median_patches", type=int, help="median bag size")
    arguments.add_argument("--epochs", type=int, help="epochs of every fold")
    arguments.add_argument("--chunk", type=int, help="patches per chunk of the attention pool")
    arguments.add_argument("--resident", choices=("on", "auto", "off"), help="cohort in device memory")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    given = ("slides", "median_patches", "epochs", "chunk", "resident")
    config |= {k: v for k in given if (v := getattr(args, k)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
