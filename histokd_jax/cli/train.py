"""Train a method on a data set, all folds and the control without distillation, and write a report.

  histokd train --config configs/mkd.py:er,fold=all --workdir runs/er --config.data.dir=DATASET
  histokd train --config configs/mkd.py:her2,faithful --workdir runs/her2 --config.loss.lambda_skd=0 ...

Any setting of the configuration can be replaced with --config.KEY=VALUE; an unknown key is refused with the nearest
names. Running the same command again continues an interrupted run. --print-config shows the resolved settings.

On several hosts the same command is started on each of them: SLURM, GKE and TPU VMs are recognised; elsewhere every
process is given the address of process 0, the number of processes and its own number.
"""

from __future__ import annotations

import argparse
import pathlib

from histokd_jax.cli import processes

HELP = "train all folds of a method and its control, then report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd train`."""
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGS]", help="settings, e.g. configs/mkd.py:er")
    parser.add_argument("--workdir", type=pathlib.Path, metavar="DIR", help="run directory (made if absent)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--allow-patient-overlap", action="store_true", help="accept patients in several parts, marked")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    processes.add_arguments(parser)
    parser.set_defaults(takes_config=True)


def run(args: argparse.Namespace) -> int:
    """Trains and prints the results table."""
    from histokd_jax.utils import config

    overrides = list(args.overrides)
    if args.allow_patient_overlap:
        overrides.append("data.allow_patient_overlap=True")
    cfg = config.load(args.config, overrides)
    if args.print_config:
        print(config.to_json(cfg))
        return 0
    if args.workdir is None:
        raise config.ConfigError("--workdir DIR is needed: where checkpoints, predictions and the report go")
    return processes.run(
        args, args.workdir, lambda: train_and_report(cfg, args.workdir, args.argv, report=not args.no_report)
    )


def train_and_report(cfg, workdir: pathlib.Path, command: list[str], *, report: bool = True) -> None:
    """Shared by `train` and `demo`."""
    from histokd_jax.tasks import get_task
    from histokd_jax.train import cache, distributed, run

    cache.enable()
    summary = run.train(cfg, workdir, command)
    if not distributed.is_main():
        return
    print(get_task(cfg).print_table(summary))
    if report:
        from histokd_jax.report.build import build_report

        print(f"report: {build_report(workdir)}")
