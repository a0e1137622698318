"""Import speed: `run_import` against reading the source with h5py alone and writing the shards alone, in turn.

`import` converts a folder as users do (headers inspected, shards planned, checksums, one process or several); `source`
reads every array of the same files with h5py, with as many processes, and drops it; `write` writes the same bags from
memory, one set of shards per process. MB are those of the source. Target: import >= 0.7 of the slower of the two.
`reread` reads all bags of the converted data and `source` all files with h5py, one thread each, both into one buffer
that is used again. `reread_first` is the first pass of a new reader, which also checks the CRC-32 of every record;
later passes (every further epoch of a training) do not. Target of the latter for TRIDENT's chunks of one row: 10 x.
Files are in the page cache, so this measures the software, not the disk.

    python -m benchmarks.bench_import [--smoke] [--out FILE] [--slides 24] [--repeats 3]
"""

from __future__ import annotations

import multiprocessing
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags, logging

from benchmarks import common

IMPORT_TARGET, REREAD_TARGET = 0.7, 10.0
SEED = 0
FULL = {
    "feat_dim": 1536, "slides": 24, "median_patches": 6000, "sigma": 0.5, "layouts": ["trident", "clam"],
    "processes": [1, 2], "repeats": 3, "shard_mib": 128,
}  # fmt: skip
SMOKE = {
    "feat_dim": 32, "slides": 6, "median_patches": 60, "sigma": 0.5, "layouts": ["trident", "clam"],
    "processes": [1, 2], "repeats": 2, "shard_mib": 0.01,
}  # fmt: skip


def write_folder(folder: pathlib.Path, layout: str, config: dict[str, Any]) -> pathlib.Path:
    """Writes float32 features of a layout: one row per chunk for TRIDENT, 32 for CLAM.

    Args:
      folder: where to write.
      layout: "trident" or "clam".
      config: sizes.

    Returns:
      The folder to import.
    """
    import h5py

    sizes = common.log_normal_sizes(config["slides"], config["median_patches"], config["sigma"], SEED)
    pool = np.random.default_rng(SEED).standard_normal((8192, config["feat_dim"])).astype(np.float32)
    root = folder / ("20x_256px_0px_overlap/features_noise" if layout == "trident" else "h5_files")
    root.mkdir(parents=True)
    for i, size in enumerate(sizes):
        rows = min(1 if layout == "trident" else 32, int(size))
        with h5py.File(root / f"TCGA-AA-{i:04d}-01Z-00-DX1.h5", "w") as file:
            features = pool[(np.arange(size) + 37 * i) % len(pool)]
            file.create_dataset("features", data=features, chunks=(rows, config["feat_dim"]))
            coords = file.create_dataset("coords", data=np.zeros((size, 2), np.int64))
            coords.attrs["patch_size_level0"] = 512
    return folder


def make_plan(folder: pathlib.Path, layout: str, config: dict[str, Any]) -> Any:
    """The plan of the import that is measured."""
    from data_pipelines.importers import cases, plan
    from data_pipelines.importers.sources import Options

    limit = int(config["shard_mib"] * 2**20)
    return plan.make_plan(
        folder, layout, name="benchmark", options=Options(), rule=cases.CaseRule(), seed=SEED, shard_bytes=limit
    )


def import_rate(
    folder: pathlib.Path, layout: str, config: dict[str, Any], scratch: pathlib.Path, processes: int
) -> Callable[[], float]:
    """A function that plans and runs an import into a new folder and returns MB of source features per second."""
    from data_pipelines.importers.run import run_import

    def run() -> float:
        shutil.rmtree(scratch, ignore_errors=True)
        began = time.perf_counter()
        plan = make_plan(folder, layout, config)
        run_import(plan, scratch, workers=processes)
        return _megabytes(plan) / (time.perf_counter() - began)

    return run


def source_rate(plan: Any, processes: int) -> Callable[[], float]:
    """A function that reads all arrays of the source with h5py and returns MB/s."""
    return _in_processes(_read_sources, plan, processes)


def write_rate(plan: Any, scratch: pathlib.Path, processes: int) -> Callable[[], float]:
    """A function that writes bags of the same sizes from memory as shards and returns source MB/s."""

    def run() -> float:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        return _in_processes(_write_shards, (plan, scratch), processes)()

    return run


def _megabytes(plan: Any) -> float:
    return sum(s.facts.n_patches * s.facts.feat_dim * 4 for s in plan.slides) / 1e6


def _in_processes(work: Callable[..., None], argument: Any, processes: int) -> Callable[[], float]:
    """Runs `work(argument, k, processes)` for each k; start-up, as in the import, is inside the clock."""
    plan = argument[0] if isinstance(argument, tuple) else argument

    def run() -> float:
        began = time.perf_counter()
        if processes == 1:
            work(argument, 0, 1)
        else:
            context = multiprocessing.get_context("spawn")
            started = [context.Process(target=work, args=(argument, k, processes)) for k in range(processes)]
            for process in started:
                process.start()
            for process in started:
                process.join()
            if any(process.exitcode for process in started):
                raise RuntimeError("a process of the benchmark failed")
        return _megabytes(plan) / (time.perf_counter() - began)

    return run


def _read_sources(plan: Any, which: int, count: int, buffer: np.ndarray | None = None) -> None:
    import h5py

    for indices in plan.shards[which::count]:
        for slide in (plan.slides[i] for i in indices):
            with h5py.File(plan.root / slide.source.file, "r") as file:
                file["coords"][()]
                if buffer is None:
                    file["features"][()]
                else:
                    file["features"].read_direct(buffer[: slide.facts.n_patches])


def _write_shards(argument: Any, which: int, count: int) -> None:
    from data_pipelines import planned_writer

    plan, scratch = argument
    pool = np.random.default_rng(SEED).standard_normal((8192, plan.facts["feat_dim"])).astype(np.float32)
    for index in range(which, len(plan.shards), count):
        planned_writer.write_shard(scratch, index, "", plan.facts, _bags(plan, index, pool))


def _bags(plan: Any, index: int, pool: np.ndarray) -> Iterator[Any]:
    from data_pipelines.planned_writer import Bag

    for slide in (plan.slides[i] for i in plan.shards[index]):
        n = slide.facts.n_patches
        features = np.resize(pool, (n, pool.shape[1])) if n > len(pool) else pool[:n]
        yield Bag(slide.slide_id, slide.case_id, features, np.zeros((n, 2), np.int32), "", {})


def reread_rates(plan: Any, dataset: pathlib.Path) -> dict[str, Callable[[], float]]:
    """Functions that read all bags from the converted data and from the source, in patches/s."""
    from data_pipelines.reader import BagReader

    n = sum(slide.facts.n_patches for slide in plan.slides)
    size = max(slide.facts.n_patches for slide in plan.slides)
    buffer, places = np.empty((size, plan.facts["feat_dim"]), np.float16), np.empty((size, 2), np.int32)
    wide = np.empty((size, plan.facts["feat_dim"]), np.float32)
    known = BagReader(dataset)

    def read_all(reader: BagReader) -> float:
        began = time.perf_counter()
        for row, slide in enumerate(reader.manifest.slides):
            reader.read_into(row, 0, slide.n_patches, buffer[: slide.n_patches], places[: slide.n_patches])
        return n / (time.perf_counter() - began)

    def source() -> float:
        began = time.perf_counter()
        _read_sources(plan, 0, 1, wide)
        return n / (time.perf_counter() - began)

    sides = {"reread": lambda: read_all(known), "reread_first": lambda: read_all(BagReader(dataset)), "source": source}
    read_all(known)
    return sides


def measure(folder: pathlib.Path, layout: str, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics and ratios of one layout."""
    source = write_folder(folder / layout, layout, config)
    plan = make_plan(source, layout, config)
    metrics, derived = {}, {}
    for count in config["processes"]:
        sides = {
            "import": import_rate(source, layout, config, folder / "out", count),
            "source": source_rate(plan, count),
            "write": write_rate(plan, folder / "shards", count),
        }
        common.alternate(sides, 1)
        values = common.alternate(sides, config["repeats"])
        cell = f"{layout}/{count} processes"
        metrics |= {f"{side}[{cell}]": common.metric(v, "MB/s") for side, v in values.items()}
        slower = np.minimum(values["source"], values["write"])
        derived[f"import_over_slower[{cell}]"] = float(np.median(np.array(values["import"]) / slower))
    sides = reread_rates(plan, folder / "out")
    common.alternate(sides, 1)
    values = common.alternate(sides, config["repeats"])
    metrics |= {f"{side}_all[{layout}]": common.metric(v, "patches/s") for side, v in values.items()}
    for side in ("reread", "reread_first"):
        derived[f"{side}_over_source[{layout}]"] = float(np.median(np.array(values[side]) / values["source"]))
    return metrics, derived


def run(config: dict[str, Any], out: pathlib.Path | None, smoke: bool) -> dict[str, Any]:
    """Runs the benchmark and writes its result."""
    metrics, derived = {}, {"smoke": smoke, "import_target": IMPORT_TARGET, "reread_target": REREAD_TARGET}
    for layout in config["layouts"]:
        with tempfile.TemporaryDirectory() as name:
            found, ratios = measure(pathlib.Path(name), layout, config)
        metrics |= found
        derived |= ratios
    imports = [value for key, value in derived.items() if key.startswith("import_over_slower")]
    derived["import_target_met"] = bool(min(imports) >= IMPORT_TARGET)
    derived["reread_target_met"] = bool(derived["reread_over_source[trident]"] >= REREAD_TARGET)
    notes = (
        "Page cache hot; MB = 10^6 bytes of float32 source features; stored as float16. Medians of alternating rounds."
    )
    return common.write_result(
        out, benchmark="bench_import", config=config, metrics=metrics, derived=derived, notes=notes
    )


def main() -> None:
    """Command line."""
    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.WARNING)
    parser = common.parser("bench_import", __doc__.splitlines()[0])
    parser.add_argument("--slides", type=int, help="number of files per layout")
    parser.add_argument("--repeats", type=int, help="rounds")
    args = parser.parse_args()
    chosen = {name: value for name in ("slides", "repeats") if (value := getattr(args, name)) is not None}
    run((SMOKE if args.smoke else FULL) | chosen, args.out, args.smoke)


if __name__ == "__main__":
    main()
