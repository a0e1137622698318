"""Reading speed: the whole input pipeline against raw record reading of the same shards, alternating.

`pipeline` iterates packed batches of a size-balanced plan, as a long training run does (start-up and first touch of the
buffers lie before the clock); `raw` reads every record of the shards in random order with
the same number of threads and drops the bytes; `tfds` reads them through `as_data_source`. A sweep repeats pipeline
and raw for several record sizes, with and without the malloc settings, one fresh process per cell. Files are in the
page cache, so this measures the software, not the disk. Target: pipeline >= 0.7 of raw.

    python -m benchmarks.bench_input [--smoke] [--out FILE]
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import flags, logging

from benchmarks import common

TARGET = 0.7
SEED = 0
FULL = {
    "feat_dim": 1024, "slides": 400, "median_patches": 1000, "sigma": 0.6, "slides_per_step": 16, "repeats": 7,
    "epochs": 4, "threads": 2, "record_kib": [64, 128, 256, 512, 1024], "sweep_repeats": 5,
}  # fmt: skip
SMOKE = {
    "feat_dim": 64, "slides": 40, "median_patches": 100, "sigma": 0.6, "slides_per_step": 8, "repeats": 2,
    "epochs": 2, "threads": 2, "record_kib": [8], "sweep_repeats": 1,
}  # fmt: skip


def pipeline_rate(directory: pathlib.Path, config: dict[str, Any], rounds: int) -> Callable[[], float]:
    """A function that reads the next epochs of one long Grain iterator and returns MB/s of valid patches.

    The steps that were prefetched since the last round are taken before the clock starts.
    """
    from data_pipelines.packing import PlanOptions, plan_coupled
    from data_pipelines.pipeline import (
        BUFFER_BYTES,
        MAX_BUFFERED_STEPS,
        SlideTable,
        StepSource,
        make_train_dataset,
        read_options,
    )
    from data_pipelines.reader import BagReader

    reader = BagReader(directory)
    sizes = reader.manifest.sizes
    per_epoch = len(sizes) // config["slides_per_step"]
    steps, spare = config["epochs"] * per_epoch, -(-MAX_BUFFERED_STEPS // per_epoch)
    options = PlanOptions(
        rounds * (config["epochs"] + spare),
        SEED,
        "uniform",
        multiple_of=128,
        chunk_patches=reader.manifest.chunk_patches,
    )
    plan = plan_coupled(sizes, None, options, slides_per_step=config["slides_per_step"])
    source = StepSource(reader, SlideTable(np.arange(len(sizes))), plan)
    row_bytes = reader.manifest.feat_dim * np.dtype(reader.manifest.dtype).itemsize
    batches = iter(make_train_dataset(source, num_threads=config["threads"]))
    buffered = read_options(source.step_bytes(plan.rows), config["threads"], BUFFER_BYTES).prefetch_buffer_size

    def run() -> float:
        for _ in range(buffered):
            next(batches)
        began, patches = time.perf_counter(), 0
        for batch in itertools.islice(batches, steps):
            patches += int((batch["segment_ids"] > 0).sum())
        return patches * row_bytes / (time.perf_counter() - began) / 1e6

    return run


def raw_rate(directory: pathlib.Path, config: dict[str, Any], rounds: int) -> Callable[[], float]:
    """A function that reads all records one by one in random order, once per epoch; MB/s of record bytes."""
    del rounds
    from array_record.python.array_record_module import ArrayRecordReader

    from data_pipelines.manifest import Manifest

    shards = [str(directory / shard.file) for shard in Manifest.load(directory).shards]
    readers = [ArrayRecordReader(shard) for shard in shards]
    records = [(r, i) for r in readers for i in range(r.num_records())]
    order = _record_order(len(records), config["epochs"])

    def read(part: np.ndarray) -> int:
        return sum(len(records[i][0].read([records[i][1]])[0]) for i in part)

    def run() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(config["threads"]) as pool:
            total = sum(pool.map(read, np.array_split(order, config["threads"] * 8)))
        return total / (time.perf_counter() - began) / 1e6

    return run


def tfds_rate(directory: pathlib.Path, config: dict[str, Any], rounds: int) -> Callable[[], float]:
    """A function that decodes all records through TFDS `as_data_source` once; MB/s of patches."""
    del rounds
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(directory)).as_data_source("train")
    order = _record_order(len(source), 1)

    def read(part: np.ndarray) -> int:
        return sum(_patch_bytes(source[int(i)]) for i in part)

    def run() -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(config["threads"]) as pool:
            total = sum(pool.map(read, np.array_split(order, config["threads"] * 8)))
        return total / (time.perf_counter() - began) / 1e6

    return run


def _record_order(n: int, epochs: int) -> np.ndarray:
    rng = np.random.default_rng(SEED)
    return np.concatenate([rng.permutation(n) for _ in range(epochs)])


def _patch_bytes(example: dict[str, Any]) -> int:
    patches = example["patches"]
    return patches.nbytes if isinstance(patches, np.ndarray) else len(patches)


def measure(directory: pathlib.Path, config: dict[str, Any], names: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Alternating rates in MB/s of the named sides, after two unmeasured rounds that warm caches and buffers."""
    makers = {"pipeline": pipeline_rate, "raw": raw_rate, "tfds": tfds_rate}
    sides = {name: makers[name](directory, config, repeats + 2) for name in names}
    common.alternate(sides, 2)
    return common.alternate(sides, repeats)


def sweep(folder: pathlib.Path, sizes: np.ndarray, config: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Pipeline and raw rates per record size and malloc setting; cells interleaved, a fresh process each."""
    directories = {}
    for kib in config["record_kib"]:
        directories[kib] = folder / f"records_{kib}kib"
        chunk = max(1, kib * 1024 // (2 * config["feat_dim"]))
        common.write_bags(directories[kib], sizes, config["feat_dim"], chunk)
    cells = {f"{kib}KiB/{name}": {} for kib in config["record_kib"] for name in ("default", "malloc")}
    for _ in range(config["sweep_repeats"]):
        for cell in cells:
            kib, setting = cell.split("KiB/")
            rates = _run_cell(directories[int(kib)], config, common.MALLOC if setting == "malloc" else {})
            for side, values in rates.items():
                cells[cell].setdefault(side, []).extend(values)
    return cells


def _run_cell(directory: pathlib.Path, config: dict[str, Any], environment: dict[str, str]) -> dict[str, list[float]]:
    clean = {key: value for key, value in os.environ.items() if key not in common.MALLOC}
    command = [sys.executable, "-m", "benchmarks.bench_input", "--cell", str(directory), "--config", json.dumps(config)]
    done = subprocess.run(
        command, cwd=common.ROOT, env={**clean, **environment}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(config: dict[str, Any], out: pathlib.Path | None, smoke: bool) -> dict[str, Any]:
    """Runs the benchmark and writes its result."""
    sizes = common.log_normal_sizes(config["slides"], config["median_patches"], config["sigma"], SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        common.write_bags(folder / "default", sizes, config["feat_dim"])
        values = measure(folder / "default", config, ("pipeline", "raw", "tfds"), config["repeats"])
        cells = sweep(folder, sizes, config)
    metrics = {f"{side}_mb_per_s": common.metric(v, "MB/s") for side, v in values.items()}
    width = config["feat_dim"] * 2
    patches = [v * 1e6 / width for v in values["pipeline"]]
    metrics["pipeline_patches_per_s"] = common.metric(patches, "patches/s")
    for cell, sides in cells.items():
        for side, v in sides.items():
            metrics[f"{side}[{cell}]"] = common.metric(v, "MB/s")
    ratios = np.array(values["pipeline"]) / np.array(values["raw"])
    derived = {
        "pipeline_over_raw": float(np.median(ratios)),
        "target": TARGET,
        "target_met": bool(np.median(ratios) >= TARGET),
        "dataset_mb": float(sizes.sum() * width / 1e6),
        "smoke": smoke,
    }
    notes = "Page cache hot; MB = 10^6 bytes of patches (raw: of records). Ratio: median over alternating rounds."
    return common.write_result(
        out, benchmark="bench_input", config=config, metrics=metrics, derived=derived, notes=notes
    )


def main() -> None:
    """Command line; --cell is the sweep's own entry for one fresh process."""
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.WARNING)
    arguments = common.parser("bench_input", __doc__.splitlines()[0])
    arguments.add_argument("--cell", type=pathlib.Path, help="measure one data set and print its rates as JSON")
    arguments.add_argument("--config", type=json.loads, help="configuration of --cell")
    args = arguments.parse_args()
    if args.cell is not None:
        print(json.dumps(measure(args.cell, args.config, ("pipeline", "raw"), 1)))
    else:
        run(SMOKE if args.smoke else FULL, args.out, args.smoke)


if __name__ == "__main__":
    main()
