"""Draw cross-validation folds of a data set: all slides of a patient together, classes or events balanced.

  histokd splits data/brca --out splits/er --labels labels.csv --task ER
  histokd splits data/brca --out splits/os --survival tcga_brca_all_clean.csv.zip --site-preserved

With --site-preserved no tissue source site is in the test part and in another part of a fold (TCGA barcodes, or a table
with the columns case_id and site). Training reads the files splits_K.csv, and `histokd validate` checks them.
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "draw patient-grouped, stratified, site-preserving folds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd splits`."""
    parser.add_argument("dataset", type=pathlib.Path, metavar="DATASET")
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of the splits_K.csv files"
    )
    parser.add_argument("--labels", metavar="FILE", help="label table; default: DATASET/tables/labels.csv if --task")
    parser.add_argument("--task", metavar="NAME", help="label column; cases without a label get no fold")
    parser.add_argument("--label-map", metavar="TEXT=CLASS,...", help="cells of the label column -> class index")
    parser.add_argument("--survival", metavar="FILE", help="survival table: balance events instead of classes")
    parser.add_argument("--folds", type=int, default=5, help="default: 5")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="of what is not test; default: 0.2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-stratify", action="store_true", help="do not balance")
    parser.add_argument("--site-preserved", action="store_true", help="keep tissue source sites whole")
    parser.add_argument("--sites", metavar="FILE", help="table with case_id and site, for ids that are no barcodes")
    parser.add_argument("--overwrite", action="store_true", help="replace the splits in DIR")


def run(args: argparse.Namespace) -> int:
    """Draws, writes and shows the folds."""
    from data_pipelines import splits

    if list(args.out.glob("splits_*.csv")) and not args.overwrite:
        raise ValueError(f"{args.out} holds splits already; choose another folder or pass --overwrite")
    cohort, strata = _cohort(args)
    options = {"n_folds": args.folds, "val_fraction": args.val_fraction, "seed": args.seed}
    stratify = bool(strata.class_names) and not args.no_stratify
    if args.site_preserved:
        from data_pipelines import sites

        folds = sites.make_site_folds(strata, _sites(args, cohort), stratify=stratify, **options)
    else:
        folds = splits.make_folds(strata, stratify=stratify, **options)
    if args.overwrite:
        for path in args.out.glob("splits_*.csv"):
            path.unlink()
    splits.write_folds(folds, cohort, args.out)
    _print(folds, strata)
    print(f"{args.out}: {len(folds)} folds of {len(cohort)} cases")
    return 0


def _cohort(args: argparse.Namespace):
    """The cohort, and the same with the classes that are balanced (labels, or events)."""
    import dataclasses

    import numpy as np

    from data_pipelines.cohort import build_cohort
    from data_pipelines.manifest import Manifest
    from histokd_jax.cli.validate import parse_label_map

    labels = args.labels or (str(args.dataset / "tables" / "labels.csv") if args.task else None)
    cohort = build_cohort(
        Manifest.load(args.dataset),
        labels_path=labels,
        task=args.task,
        survival_path=args.survival,
        label_map=parse_label_map(args.label_map),
    )
    if args.survival is None:
        return cohort, cohort
    cohort = cohort.subset(np.flatnonzero(np.isfinite(cohort.survival.time_months)))
    if not len(cohort):
        raise ValueError(f"{args.survival}: no case of {args.dataset} has follow-up; see `histokd validate`")
    event = cohort.survival.event.astype(np.int32)
    return cohort, dataclasses.replace(cohort, label=event, class_names=("censored", "event"))


def _sites(args: argparse.Namespace, cohort) -> dict[str, str]:
    from data_pipelines import sites, text_table

    if args.sites is None:
        return sites.sites_of(cohort.case_id)
    table = text_table.read_text_table(args.sites, ("case_id", "site"))
    return {case: site for case, site in zip(table["case_id"], table["site"]) if site}


def _print(folds, cohort) -> None:
    import numpy as np

    for number, split in enumerate(folds):
        cells = []
        for part in ("train", "val", "test"):
            rows = getattr(split, part)
            counts = np.bincount(cohort.label[rows], minlength=len(cohort.class_names)) if cohort.class_names else []
            told = ", ".join(f"{name} {count}" for name, count in zip(cohort.class_names, counts))
            cells.append(f"{part} {len(rows)}" + (f" ({told})" if told else ""))
        print(f"fold {number}: {'; '.join(cells)}")
