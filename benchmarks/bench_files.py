"""Training from disk, end to end: our shards through Grain to packed steps, against PyTorch as users run it.

The peer reads one .pt file per slide (float32, as CLAM writes them; --file-dtype float16 halves them) through a
DataLoader and takes one update per bag; the better of its numbers of workers counts. (h5py is no dependency of this
project; TRIDENT's .h5 holds the same array.) Both sides train the same student on bags of the same sizes, on CPU, or on
the GPU where JAX runs on one. Files are in the page cache: this measures the software, not the disk.

    python -m benchmarks.bench_files [--smoke] [--medians 100 1000 10000] [--compute-dtype bfloat16] [--out FILE]
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

from benchmarks import bench_e2e, bench_step, common
from data_pipelines.pipeline import StepIterator

GPU_TARGETS = {1000: 200.0}
FULL = {
    "feat_dim": 1024, "genes": 512, "token_size": 512, "model_d": 256, "model_attn": 128, "slides": 320, "sigma": 0.8,
    "medians": [1000], "dataset_gb": 4.0, "slides_per_step": 16, "chunk": 512, "row_multiple": 128, "threads": 2,
    "workers": [0, 2], "file_dtype": "float32", "compute_dtype": "float32", "repeats": 3,
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "genes": 64, "token_size": 32, "model_d": 16, "model_attn": 8, "slides": 12, "sigma": 0.8,
    "medians": [40], "dataset_gb": 0.1, "slides_per_step": 4, "chunk": 64, "row_multiple": 64, "threads": 2,
    "workers": [0, 1], "file_dtype": "float32", "compute_dtype": "float32", "repeats": 1,
}  # fmt: skip


def bag_sizes(config: dict[str, Any], median: int) -> np.ndarray:
    """Log-normal sizes of as many slides as both copies of the data set have room for, at least four steps' worth.

    Raises:
      ValueError: if fewer fit.
    """
    sizes = common.log_normal_sizes(config["slides"], median, config["sigma"], bench_step.SEED)
    per_patch = config["feat_dim"] * (bench_step.ITEMSIZE[config["file_dtype"]] + 2)  # the files, and fp16 shards
    fit = int(np.searchsorted(np.cumsum(sizes) * per_patch, config["dataset_gb"] * 1e9, side="right"))
    fit = fit // config["slides_per_step"] * config["slides_per_step"]
    if fit < 2 * config["slides_per_step"]:
        raise ValueError(f"median {median}: {fit} slides fit in {config['dataset_gb']} GB; raise --dataset-gb")
    return sizes[:fit]


def our_side(directory: pathlib.Path, config: dict[str, Any]) -> Callable[[], float]:
    """A function that trains one epoch from the shards, start-up of the readers included; valid patches/s."""
    source = bench_e2e.open_source(directory, config)
    method = bench_step.build_method("student", config["compute_dtype"], config)
    train = bench_step.Trainer(method, next(StepIterator(source, num_threads=0)))
    loop = bench_e2e.end_to_end(train, source, config["threads"])
    return lambda: loop()["rate"]


def peer_side(folder: pathlib.Path, labels: np.ndarray, workers: int, config: dict[str, Any]) -> Callable[[], float]:
    """A function that trains one epoch from the files; patches/s."""
    from benchmarks import torch_files, torch_peer

    device = torch_peer.device_for(jax.default_backend())
    module = torch_peer.StudentPeer(config["feat_dim"], config["model_d"], config["model_attn"]).to(device)
    batches = torch_files.loader(torch_files.SlideFiles(folder, labels), workers, device)
    epoch = torch_files.make_epoch(module, batches, device, bfloat16=config["compute_dtype"] == "bfloat16")

    def run() -> float:
        with torch_peer.all_cores():
            began = time.perf_counter()
            patches, _ = epoch()
            return patches / (time.perf_counter() - began)

    return run


def measure(config: dict[str, Any], median: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, derived) of one median bag size; the sides take turns."""
    from benchmarks import torch_files

    sizes = bag_sizes(config, median)
    labels = bench_step.slot_fields(len(sizes), 1)["label"]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        common.write_bags(folder / "shards", sizes, config["feat_dim"])
        torch_files.write_files(folder / "files", sizes, config["feat_dim"], config["file_dtype"])
        sides = {"packed": our_side(folder / "shards", config)}
        for workers in config["workers"]:
            sides[f"files_workers{workers}"] = peer_side(folder / "files", labels, workers, config)
        common.alternate(sides, 1)  # warms caches, buffers and workers
        values = common.alternate(sides, config["repeats"])
        del sides  # ends the workers before their files go
    peers = [name for name in values if name != "packed"]
    better = max(peers, key=lambda name: np.median(values[name]))
    ratios = (np.array(values["packed"]) / np.array(values[better])).tolist()
    metrics = {f"{name}[median {median}]": common.metric(v, "valid patches/s") for name, v in values.items()}
    metrics[f"packed_over_files[median {median}]"] = common.metric(ratios, "x")
    derived = {
        "slides": len(sizes),
        "better_peer": better,
        "ratio": float(np.median(ratios)),
    }
    if jax.default_backend() == "gpu" and median in GPU_TARGETS:
        target = GPU_TARGETS[median]
        derived |= {"target": target, "meets_target": derived["ratio"] >= target}
    return metrics, derived


def run(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measures every median bag size and writes the result."""
    obstacle = bench_step.peer_obstacle()
    if obstacle:
        raise SystemExit(f"bench_files compares with PyTorch: {obstacle}")
    metrics, derived = {}, {"smoke": args.smoke}
    for median in config["medians"]:
        found, derived[f"median {median}"] = measure(config, median)
        metrics.update(found)
    notes = (
        "packed: fp16 shards, Grain, one packed step and update per b slides. files: one .pt per slide, DataLoader, "
        "one update per slide, every loss read. End to end per epoch, page cache hot, same network and bag sizes."
    )
    return common.write_result(
        bench_step.result_path(args, "bench_files"),
        benchmark="bench_files",
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
    arguments = common.parser("bench_files", __doc__.splitlines()[0])
    arguments.add_argument("--medians", type=int, nargs="+", help="median bag sizes")
    arguments.add_argument("--file-dtype", choices=("float32", "float16"), help="dtype of the peer's files")
    arguments.add_argument("--compute-dtype", choices=("float32", "bfloat16"), help="dtype of the products, both sides")
    arguments.add_argument("--dataset-gb", type=float, help="10^9 bytes on disk for both copies of the data set")
    arguments.add_argument("--chunk", type=int, help="patches per chunk of the attention pool")
    arguments.add_argument("--workers", type=int, nargs="+", help="numbers of DataLoader workers")
    arguments.add_argument("--threads", type=int, help="our reader threads")
    arguments.add_argument("--repeats", type=int, help="rounds")
    args = arguments.parse_args()
    config = dict(SMOKE if args.smoke else FULL)
    given = ("medians", "file_dtype", "compute_dtype", "dataset_gb", "chunk", "workers", "threads", "repeats")
    config |= {k: v for k in given if (v := getattr(args, k)) is not None}
    run(config, args)


if __name__ == "__main__":
    main()
