"""The main job end to end on a small simulated cohort: simulate, train with and without distillation, report.

Takes a few minutes on two cores. Ends with a results table and an openable report; every figure says "simulated bags".
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "run everything end to end on a simulated cohort (minutes)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd demo`."""
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="seed of cohort and training")
    parser.add_argument("--smoke", action="store_true", help="two folds, two epochs: only shows that it runs")


def run(args: argparse.Namespace) -> int:
    """Simulates (once), trains, reports."""
    from data_pipelines import simulate
    from data_pipelines.manifest import MANIFEST_FILE
    from histokd_jax.cli.simulate import make_spec
    from histokd_jax.cli.train import train_and_report
    from histokd_jax.utils import config

    data = args.workdir / "cohort"
    if not (data / MANIFEST_FILE).exists():
        print(f"simulating a cohort in {data}")
        simulate.simulate_cohort(data, make_spec(simulate.DEMO, [], args.seed))
    preset = "smoke" if args.smoke else "demo"
    cfg = config.load(f"configs/mkd.py:er,{preset},fold=all,seed={args.seed}", [f"data.dir={data}"])
    train_and_report(cfg, args.workdir / "run", args.argv)
    return 0
