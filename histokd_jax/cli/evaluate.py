"""Recompute the summary of a run, or test its models on another labelled data set.

  histokd evaluate --workdir runs/er                         summary.json again from the stored predictions
  histokd evaluate --workdir runs/er --data EXTERNAL --labels labels.csv --out runs/er_external

External test: every fold's model is applied unchanged to the whole set; the table shows the mean over the models.
Intervals are drawn as in the run (its seed, resamples and unit), so the first form reproduces the run's summary.
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "recompute a run's summary, or test it on another data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd evaluate`."""
    parser.add_argument("--workdir", type=pathlib.Path, required=True, metavar="RUN", help="run directory")
    parser.add_argument("--data", type=pathlib.Path, metavar="DATASET", help="external data set")
    parser.add_argument(
        "--labels",
        default="",
        metavar="FILE",
        help="its labels or follow-up; default: tables/{labels,survival}.csv (image pairs hold their own)",
    )
    parser.add_argument("--task", default="", help="label column; default: the task of the run")
    parser.add_argument("--mode", default="", help="pathology, both or genomics; default: infer.mode of the model")
    parser.add_argument("--genes", default="", metavar="FILE", help="its genes, if the mode needs them")
    parser.add_argument("--cnv", default="", metavar="FILE", help="its copy numbers, for gmkdn modes that need them")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="where to write the external results")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="resamples of the intervals; default: as the run")


def run(args: argparse.Namespace) -> int:
    """Writes summary.json and prints the table."""
    from histokd_jax.evals import summary as summaries
    from histokd_jax.tasks import get_task
    from histokd_jax.utils import config

    facts = _facts(args.workdir)
    cfg = config.from_json((args.workdir / "config.json").read_text())
    task = get_task(cfg)
    if args.data is None:
        table, out = task.read_table(args.workdir / "predictions_test.csv"), args.workdir
    else:
        table, facts = _external(args, task, facts)
        out = args.out or args.workdir / "external"
        out.mkdir(parents=True, exist_ok=True)
        task.write_table(out / "predictions_test.csv", table)
    reference = task.read_reference(args.workdir, table.folds)
    summary = task.summarise(table, reference, facts, _resampling(cfg, args.bootstrap))
    print(task.print_table(summary))
    print(f"summary: {summaries.write_summary(out / 'summary.json', summary)}")
    return 0


def _facts(workdir: pathlib.Path) -> dict:
    import json

    from histokd_jax.tasks import get_task
    from histokd_jax.train.run_summary import summary_facts
    from histokd_jax.utils import config

    path = workdir / "run_manifest.json"
    if not path.is_file():
        raise ValueError(f"{workdir} is no run directory: run_manifest.json is missing")
    task = get_task(config.from_json((workdir / "config.json").read_text()))
    return summary_facts(task, json.loads(path.read_text()))


def _resampling(cfg, bootstrap: int | None) -> dict:
    from histokd_jax.train.run_summary import resampling

    options = resampling(cfg)
    return options if bootstrap is None else {**options, "bootstrap": bootstrap}


def _external(args: argparse.Namespace, task, facts: dict):
    from histokd_jax import inference
    from histokd_jax.train import data_kinds
    from histokd_jax.utils import config

    labels = args.labels or str(args.data / "tables" / f"{task.answers}.csv")
    folders = inference.model_folders(args.workdir)
    mode = args.mode or inference.default_mode(folders[0])
    table = inference.predict(folders, args.data, mode, labels=labels, genes=args.genes, cnv=args.cnv, task=args.task)
    cfg = config.from_json((args.workdir / "config.json").read_text())
    manifest = data_kinds.training(cfg).open_manifest(args.data)
    return table, {
        **facts,
        "task": args.task or facts["task"],
        "dataset": manifest.name,
        "simulated": manifest.simulated,
        "data_fingerprint": manifest.fingerprint(),
        "external": True,
        "trained_on": {key: facts[key] for key in ("dataset", "simulated")},
    }
