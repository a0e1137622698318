"""Write report.html of a run directory: results, what distillation bought, curves, calibration, provenance."""

from __future__ import annotations

import argparse
import pathlib

HELP = "write report.html of a run directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd report`."""
    parser.add_argument("workdir", type=pathlib.Path, metavar="RUN", help="run directory")


def run(args: argparse.Namespace) -> int:
    """Builds the report."""
    from histokd_jax.report.build import build_report

    print(f"report: {build_report(args.workdir)}")
    return 0
