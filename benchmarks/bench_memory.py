"""Peak resident memory against the number of slides: 200 and 2,000 simulated bags, a fresh process per cell.

Every cell takes the same number of steps of the same shape, so that only the number of slides differs. The default
iterates the input pipeline; `--train` runs `histokd train` (MKD, one fold) on the same data instead, with the number of
epochs that gives equal steps.

    python -m benchmarks.bench_memory [--train] [--smoke] [--out FILE]
    python -m benchmarks.bench_memory --train --config FILE --train-args "--config.train.b=8 ..."
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from benchmarks import common

# Peaks of equal runs differ by a few per cent with the timing of threads.
GROWTH_LIMIT = 1.10
SEED = 0
FULL = {
    "slides": [200, 2000], "feat_dim": 1024, "median_patches": 300, "sigma": 0.6, "largest_bag": 1500,
    "slides_per_step": 16, "steps": 250, "rows": 1, "row_patches": 8192, "threads": 2, "repeats": 3, "genes": 512,
}  # fmt: skip
SMOKE = {
    "slides": [20, 200], "feat_dim": 32, "median_patches": 30, "sigma": 0.6, "largest_bag": 100,
    "slides_per_step": 4, "steps": 50, "rows": 1, "row_patches": 512, "threads": 2, "repeats": 1, "genes": 32,
}  # fmt: skip
FOLDS, VAL_FRACTION = 5, 0.2


def write_cohort(directory: pathlib.Path, slides: int, config: dict[str, Any]) -> None:
    """Writes bags of noise with random labels and genes; contents do not matter to memory."""
    sizes = common.log_normal_sizes(slides, config["median_patches"], config["sigma"], SEED)
    common.write_bags(directory, np.minimum(sizes, config["largest_bag"]), config["feat_dim"])
    tables = directory / "tables"
    tables.mkdir()
    rng, cases = np.random.default_rng(SEED), [f"case{i:06d}" for i in range(slides)]
    labels = "\n".join(f"{case},{i % 2}" for i, case in enumerate(cases))
    (tables / "labels.csv").write_text(f"case_id,ER\n{labels}\n")
    names = np.array([f"G{i}" for i in range(config["genes"])])
    values = rng.standard_normal((slides, len(names))).astype(np.float32)
    np.savez(tables / "genes.npz", case_id=np.array(cases), gene=names, values=values)
    months = "\n".join(f"{case},{rng.uniform(1, 100):.2f},{i % 3 == 0:d}" for i, case in enumerate(cases))
    (tables / "survival.csv").write_text(f"case_id,time_months,event\n{months}\n")


def iterate(directory: pathlib.Path, config: dict[str, Any]) -> None:
    """Iterates the planned steps of the input pipeline, touching every batch."""
    from absl import flags, logging

    from data_pipelines.packing import PlanOptions, plan_coupled
    from data_pipelines.pipeline import SlideTable, StepSource, make_train_dataset
    from data_pipelines.reader import BagReader

    flags.FLAGS.mark_as_parsed()
    logging.set_verbosity(logging.WARNING)
    reader = BagReader(directory)
    sizes, b = reader.manifest.sizes, config["slides_per_step"]
    options = PlanOptions(
        epochs=-(-config["steps"] // (len(sizes) // b)),
        seed=SEED,
        sampler="uniform",
        rows=config["rows"],
        multiple_of=config["row_patches"],
        chunk_patches=reader.manifest.chunk_patches,
    )
    plan = plan_coupled(sizes, None, options, slides_per_step=b)
    if plan.row_patches != config["row_patches"]:
        raise ValueError(f"steps have {plan.row_patches} patches per row; cells must share {config['row_patches']}")
    source = StepSource(reader, SlideTable(np.arange(len(sizes))), plan)
    total = 0
    for _, batch in zip(range(config["steps"]), make_train_dataset(source, num_threads=config["threads"])):
        total += int((batch["segment_ids"] > 0).sum())
    print(json.dumps({"patches": total, "fill": plan.fill()}))


def peak_mib(command: list[str]) -> float:
    """Peak resident memory of a command in MiB, from the accounting of the operating system.

    A new process starts its record at what its parent holds, so callers must stay small themselves.

    Raises:
      RuntimeError: if the command fails, with the end of its error output.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=common.ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{shlex.join(command)} failed with {process.returncode}:\n{errors.read()[-4000:]}")
    return usage.ru_maxrss / 1024


def run(config: dict[str, Any], args: Any) -> dict[str, Any]:
    """Measures all cells in turn and writes the result."""
    name = "bench_memory_train" if args.train else "bench_memory"
    out = args.out
    if args.smoke and out is None:  # never among the results
        out = pathlib.Path(tempfile.mkdtemp()) / f"{name}.json"
    few, many = config["slides"]
    with tempfile.TemporaryDirectory() as folder:
        for slides in config["slides"]:
            peak_mib(_cell("--write", _dataset(folder, slides), {**config, "write_slides": slides}))
        values = {slides: [] for slides in config["slides"]}
        for repeat in range(config["repeats"]):
            for slides in config["slides"]:
                dataset, workdir = _dataset(folder, slides), pathlib.Path(folder) / f"run_{slides}_{repeat}"
                command = _cell("--iterate", dataset, config)
                if args.train:
                    command = train_command(dataset, workdir, slides, config, args)
                values[slides].append(peak_mib(command))
    growth = float(np.median(values[many]) / np.median(values[few]))
    metrics = {f"peak_rss[{slides} slides]": common.metric(v, "MiB") for slides, v in values.items()}
    derived = {"growth": growth, "limit": GROWTH_LIMIT, "does_not_grow": growth <= GROWTH_LIMIT, "smoke": args.smoke}
    settings = {**config, "mode": "pipeline"}
    if args.train:
        settings = {**config, "mode": "train", "train_config": args.config, "train_args": args.train_args}
    notes = "Peak resident set of a fresh process; simulated bags; equal step shape and number of steps in all cells."
    return common.write_result(out, benchmark=name, config=settings, metrics=metrics, derived=derived, notes=notes)


def _dataset(folder: str, slides: int) -> pathlib.Path:
    return pathlib.Path(folder) / f"slides_{slides}"


def _cell(action: str, directory: pathlib.Path, config: dict[str, Any]) -> list[str]:
    settings = ["--settings", json.dumps(config)]
    return [sys.executable, "-m", "benchmarks.bench_memory", action, str(directory), *settings]


def train_command(
    dataset: pathlib.Path, workdir: pathlib.Path, slides: int, config: dict[str, Any], args: Any
) -> list[str]:
    """`histokd train` on one data set: one fold, no control, as many epochs as the wanted number of steps takes.

    Row lengths are multiples of the chunk: one chunk per row gives the steps of all data sets the same length.
    """
    steps_per_epoch = int(slides * (1 - 1 / FOLDS) * (1 - VAL_FRACTION)) // config["slides_per_step"]
    overrides = {
        "data.dir": dataset,
        "data.feat_dim": 0,
        "data.chunk": config["row_patches"],
        "data.threads": config["threads"],
        "genes.top_k": config["genes"],
        "genes.token_size": config["genes"] // 4,
        "train.b": config["slides_per_step"],
        "train.max_epochs": max(1, round(config["steps"] / steps_per_epoch)),
        "early_stop.enabled": False,
        "ckpt.every_epochs": config["steps"],  # the last epoch only: checkpoints would come per slide, not per step
        "split.n_folds": FOLDS,
        "split.val_fraction": VAL_FRACTION,
        "compare.control": False,
        "report.bootstrap": 20,
    }
    command = [sys.executable, "-m", "histokd_jax.cli.main", "train", "--config", args.config]
    extra = [f"--config.{key}={value}" for key, value in overrides.items()] + shlex.split(args.train_args)
    return [*command, "--workdir", str(workdir), *extra]


def main() -> None:
    """Command line; --write and --iterate are entries for one fresh process."""
    arguments = common.parser("bench_memory", __doc__.splitlines()[0])
    arguments.add_argument("--train", action="store_true", help="run `histokd train` instead of the bare pipeline")
    arguments.add_argument("--config", default="configs/mkd.py:er,fold=0", help="config of --train")
    arguments.add_argument("--train-args", default="", help="further arguments of `histokd train`")
    arguments.add_argument("--write", type=pathlib.Path, help="write one data set and exit")
    arguments.add_argument("--iterate", type=pathlib.Path, help="iterate one data set and exit")
    arguments.add_argument("--settings", type=json.loads, help="configuration of --write and --iterate")
    args = arguments.parse_args()
    if args.write is not None:
        write_cohort(args.write, args.settings["write_slides"], args.settings)
    elif args.iterate is not None:
        iterate(args.iterate, args.settings)
    else:
        run(SMOKE if args.smoke else FULL, args)


if __name__ == "__main__":
    main()
