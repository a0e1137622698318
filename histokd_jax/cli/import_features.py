"""Import a folder of patch features made by other software: CLAM, TRIDENT, STAMP, slideflow, GigaPath, or plain files.

  histokd import trident_job/20x_256px_0px_overlap --out data/brca          layout and facts are read from the folder
  histokd import features/ --out data/ours --cases slides.csv --mpp 0.5     table slide_id,case_id
  histokd import stamp/uni-1a2b --out data/crc --level0-mpp 0.25            coordinates in micrometres become pixels

With --beam the shards are written by the workers of an Apache Beam runner (extra `beam`), with equal bytes; source and
DATASET must lie on a file system that all of them see.

An interrupted import is continued by the same command and ends in the same bytes; repeating a finished one changes
nothing.
Files that cannot be used are listed with reasons in quarantine.csv of the data set.

Exit code: 0 everything imported; 3 imported, but some files are in quarantine; 1 nothing was imported.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex

HELP = "import feature folders of CLAM, TRIDENT, STAMP, slideflow, GigaPath"
EXIT_QUARANTINE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd import`."""
    parser.add_argument("source", type=pathlib.Path, metavar="SRC", help="folder of feature files")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DATASET", help="data set to write")
    formats = ("auto", "clam", "trident", "stamp", "slideflow", "gigapath", "plain")
    parser.add_argument("--format", choices=formats, default="auto", help="layout of SRC; default: recognise it")
    parser.add_argument("--name", help="name of the data set; default: that of the folder DATASET")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="stored type")
    parser.add_argument("--seed", type=int, default=0, help="of the order of patches within a slide")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave files out; repeatable")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument("--beam", metavar="OPTIONS", help="run on Apache Beam, e.g. --beam='--runner=DirectRunner'")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in DATASET")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be done")
    _add_case_arguments(parser)
    _add_fact_arguments(parser)


def _add_case_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("patients (default: the first 12 characters of TCGA barcodes)")
    group.add_argument("--cases", metavar="TABLE", help="CSV with slide_id and case_id; slides not in it are left out")
    group.add_argument("--case-regex", metavar="REGEX", help="searched in the slide id; its group is the case id")
    group.add_argument("--case-per-slide", action="store_true", help="every slide is a patient of its own")


def _add_fact_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("facts that the files do not record (those they do may not be contradicted)")
    group.add_argument("--encoder", metavar="NAME", help="patch encoder; in a TRIDENT job it selects features_NAME")
    group.add_argument("--encoder-licence", metavar="TEXT", help="licence of its weights")
    group.add_argument("--mpp", type=float, help="micrometres per pixel at which patches were read")
    group.add_argument("--magnification", type=float, help="at which patches were read, e.g. 20")
    group.add_argument("--patch-size-level0", type=float, metavar="PX", help="edge of a patch in level-0 pixels")
    group.add_argument(
        "--level0-mpp", type=float, metavar="MPP", help="size of a level-0 pixel, to convert micrometres"
    )
    group.add_argument("--coords", choices=("level0", "as-recorded", "drop"), default="level0", help="default: level0")
    group.add_argument("--features-key", metavar="NAME", help="array of features in plain files")
    group.add_argument("--coords-key", metavar="NAME", help="array of coordinates in plain files")
    group.add_argument("--patches", metavar="DIR", help="CLAM's folder patches/ if it is not beside the features")


def run(args: argparse.Namespace) -> int:
    """Plans and runs the import, and prints its account."""
    from data_pipelines.importers import detect
    from data_pipelines.importers import plan as planning
    from data_pipelines.importers import run as running

    layout, evidence = detect.detect(args.source, args.format)
    print(f"layout: {layout} ({'; '.join(evidence[:3])})")
    try:
        return _plan_and_run(args, layout)
    except planning.NothingUsable as error:
        if not args.dry_run and not (args.out / "manifest.json").exists():
            running.write_quarantine(args.out, error.rejected)
        raise


def _plan_and_run(args: argparse.Namespace, layout: str) -> int:
    from data_pipelines.importers.cases import CaseRule
    from data_pipelines.importers.plan import make_plan

    plan = make_plan(
        args.source,
        layout,
        name=args.name or args.out.resolve().name,
        options=_options(args),
        rule=CaseRule(args.case_regex, args.cases, args.case_per_slide),
        dtype=args.dtype,
        seed=args.seed,
    )
    _print_plan(plan)
    if args.dry_run:
        print_rejected(plan.rejected)
        return EXIT_QUARANTINE if plan.rejected else 0
    outcome = _import(plan, args)
    _print_outcome(outcome, args.out)
    return EXIT_QUARANTINE if outcome.rejected else 0


def _options(args: argparse.Namespace):
    import dataclasses

    from data_pipelines.importers.sources import Options

    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Options)}
    for name in ("mpp", "magnification", "patch_size_level0", "level0_mpp"):
        if given[name] is not None and not 0 < given[name] < 1e6:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: expected a positive number")
    return Options(**{**given, "exclude": tuple(args.exclude)})


def _import(plan, args: argparse.Namespace):
    from tqdm import tqdm

    from data_pipelines.importers.run import run_import

    if args.beam is not None:
        from data_pipelines.beam.importing import import_on_beam

        return import_on_beam(plan, args.out, options=shlex.split(args.beam), overwrite=args.overwrite)
    with tqdm(total=len(plan.slides), unit="slide", disable=None) as bar:
        return run_import(plan, args.out, workers=args.workers, overwrite=args.overwrite, progress=bar.update)


def _print_plan(plan) -> None:
    facts = plan.facts
    known = {"encoder": (facts["encoder"] or {}).get("name"), "mpp": facts["mpp"], "mag": facts["magnification"]}
    told = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
    told = f"; {told}" if told else ""
    print(f"{len(plan.slides)} slides of width {facts['feat_dim']}; shards: {len(plan.shards)}{told}")
    for note in plan.notes:
        print(f"  {note}")


def print_rejected(rejected, noun: str = "files") -> None:
    """What is in quarantine: counts by reason, and the first of them; `noun` says what they are."""
    import collections

    if not rejected:
        return
    counts = collections.Counter(item.reason for item in rejected)
    print(f"quarantine: {len(rejected)} {noun}: {', '.join(f'{n} {reason}' for reason, n in sorted(counts.items()))}")
    for item in rejected[:10]:
        print(f"  {item.file}: {item.reason}: {item.detail}")
    if len(rejected) > 10:
        print("  ...; all are in quarantine.csv")


def _print_outcome(outcome, out: pathlib.Path) -> None:
    manifest = outcome.manifest
    cases = len({slide.case_id for slide in manifest.slides})
    state = "was complete already, nothing changed" if outcome.already_complete else "written"
    kept = f"; {outcome.shards_kept} shards kept from an interrupted import" if outcome.shards_kept else ""
    print(
        f"{out}: {state}: {len(manifest.slides)} slides of {cases} cases, {int(manifest.sizes.sum())} patches of width "
        f"{manifest.feat_dim} in {manifest.dtype}{kept}"
    )
    print_rejected(outcome.rejected)
