"""Train many settings of a method, each over folds and seeds, and compare them in one table.

  histokd sweep --config configs/ablations/mkd.py:er --workdir runs/ablations --seeds 0,1,2 --config.data.dir=DATASET
  histokd sweep --config configs/ablations/mkd.py:er,terms --workdir runs/terms --only without_skd --dry-run ...

Settings that differ only in data of the step (loss weights, seed, fold, learning rate, choice of genes) are trained
together as one program; the groups are printed first, and --dry-run stops there. Running the same command again
continues an interrupted sweep; finished trainings are kept, so seeds or settings can also be added later.

A training that diverges is stopped alone and reported; the others go on, and the exit code is 1 in the end. Every
setting and seed has a run directory of its own (DIR/SETTING/seed_N) for histokd report, evaluate and predict.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

HELP = "train settings x seeds x folds together and compare them in one table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd sweep`."""
    parser.add_argument(
        "--config", required=True, metavar="FILE.py[:ARGS]", help="list of settings, e.g. configs/ablations/mkd.py:er"
    )
    parser.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="directory of the sweep (made if absent)")
    parser.add_argument("--seeds", default="0", metavar="N,N,...", help="seeds of every setting (default: 0)")
    parser.add_argument(
        "--only", default="", metavar="NAME,...", help="some settings of the list; the reference is always trained"
    )
    parser.add_argument(
        "--max-replicas",
        type=int,
        default=0,
        metavar="N",
        help="most trainings in one program (default: as many as fit into half of the memory)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check settings and data, print the groups and stop")
    parser.set_defaults(takes_config=True)


def run(args: argparse.Namespace) -> int:
    """Trains the sweep and prints its table; 1 if a training diverged."""
    from histokd_jax.utils import config

    seeds = _seeds(args.seeds)
    if args.max_replicas < 0:
        raise config.ConfigError(f"--max-replicas {args.max_replicas}: give a positive number, or 0 for no limit")
    settings, reference = config.load_sweep(args.config, args.overrides, _names(args.only))
    if args.workdir is None and not args.dry_run:
        raise config.ConfigError("--workdir DIR is needed: where runs, checkpoints and the table go")

    from histokd_jax.train import cache, sweep

    plan = sweep.prepare(settings, reference, seeds)
    print(plan.describe(), flush=True)
    if args.dry_run:
        return 0
    cache.enable()
    found = sweep.train(plan, args.workdir, args.argv, args.max_replicas)
    print((args.workdir / "table.md").read_text())
    print(f"table: {args.workdir / 'table.md'} (also .csv and .json)")
    for name, why in found["failed"].items():
        print(f"histokd sweep: {name} diverged and was stopped: {why}", file=sys.stderr)
    return 1 if found["failed"] else 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    from histokd_jax.utils import config

    names = _names(text)
    if not names or not all(name.isdigit() for name in names):
        raise config.ConfigError(f"--seeds {text}: give whole numbers from 0, separated by commas, e.g. 0,1,2")
    return [int(name) for name in names]
