"""Checkpoints of a full MKD state: seconds to save and restore, MB/s, and how long a save holds up the loop.

`save` and `restore` are those of the trainer (`RunCheckpoints`); the state is saved right after a step is dispatched,
as at the end of an epoch, and the hold-up is the time of steps with one save among them beyond that of the steps alone.
Files go to a temporary folder (--folder to choose the file system); MB are 10^6 bytes of the state.

    python -m benchmarks.bench_checkpoint [--smoke] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks import bench_collectives, bench_step, common
from histokd_jax.train.checkpoint import RunCheckpoints

FULL = {
    "feat_dim": 1024, "genes": 8192, "token_size": 512, "model_d": 256, "model_attn": 128, "method": "mkd",
    "slides_per_step": 16, "step_patches": 16_384, "chunk": 512, "compute_dtype": "float32", "loop_steps": 10,
    "repeats": 7,
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "method": "student",
    "slides_per_step": 4, "step_patches": 256, "chunk": 64, "compute_dtype": "float32", "loop_steps": 2, "repeats": 2,
}  # fmt: skip
IDENTITY = {"benchmark": "bench_checkpoint"}
PROGRESS = {"step": 0}


def loop_seconds(train: bench_step.Trainer, batch: Any, steps: int, save: Any = None) -> float:
    """Seconds of `steps` steps in a row; `save` is called once, in the middle, on the state of a step in flight."""
    jax.block_until_ready(train(batch))
    began, loss = time.perf_counter(), None
    for i in range(steps):
        loss = train(batch)
        if save is not None and i == steps // 2:
            save(train.state)
    jax.block_until_ready(loss)
    return time.perf_counter() - began


def state_bytes(state: Any) -> int:
    """Bytes of all numeric leaves of a training state; typed keys count their words."""
    leaves = [
        jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]
    return int(sum(leaf.nbytes for leaf in leaves))


def measure(config: dict[str, Any], folder: pathlib.Path) -> tuple[dict[str, list[float]], int]:
    """(seconds by kind and round, bytes of the state)."""
    train, batch = bench_collectives.trainer(config, 1, config["step_patches"])
    values: dict[str, list[float]] = {name: [] for name in ("save", "restore", "loop", "loop_with_save")}
    with RunCheckpoints(folder, IDENTITY) as checkpoints:
        number = 0

        def save(state: Any) -> None:
            nonlocal number
            number += 1
            checkpoints.save(number, state, PROGRESS)

        def timed(run: Any) -> float:
            began = time.perf_counter()
            jax.block_until_ready(run())
            return time.perf_counter() - began

        sides = {
            "save": lambda: timed(lambda: save(train.state)),
            "restore": lambda: timed(lambda: _arrays(checkpoints.restore(train.state))),
            "loop": lambda: loop_seconds(train, batch, config["loop_steps"]),
            "loop_with_save": lambda: loop_seconds(train, batch, config["loop_steps"], save),
        }
        jax.block_until_ready(train(batch))
        save(train.state)
        common.alternate(sides, 1)
        values = common.alternate(sides, config["repeats"])
    return values, state_bytes(train.state)


def _arrays(state: Any) -> list[jax.Array]:
    return jax.tree.leaves(state)


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures and writes the result."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        values, size = measure(config, pathlib.Path(folder) / "checkpoints")
    metrics = {name: common.metric(seconds, "s") for name, seconds in values.items()}
    for name in ("save", "restore"):
        metrics[f"{name}_rate"] = common.metric((size / 1e6 / np.array(values[name])).tolist(), "MB/s")
    held_up = float(np.median(values["loop_with_save"]) - np.median(values["loop"]))
    derived = {
        "smoke": args.smoke,
        "state_mb": size / 1e6,
        "loop_held_up_seconds": held_up,
        "steps_lost_per_save": held_up / (metrics["loop"]["median"] / config["loop_steps"]),
    }
    notes = "State: parameters, best parameters, optimizer moments, metric sums. Page cache hot; nothing is synced."
    return common.write_result(
        bench_step.result_path(args, "bench_checkpoint"),
        benchmark="bench_checkpoint",
        config=config,
        metrics=metrics,
        derived=derived,
        notes=notes,
        devices=(jax.devices()[0].device_kind, 1),
    )


def main() -> None:
    """Command line."""
    arguments = common.parser("bench_checkpoint", __doc__.splitlines()[0])
    arguments.add_argument("--folder", type=pathlib.Path, help="where to write; default: the system's temporary folder")
    arguments.add_argument("--repeats", type=int, help="rounds")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    if args.repeats is not None:
        config["repeats"] = args.repeats
    run(config, args)


if __name__ == "__main__":
    main()
