"""Import image pairs (an H&E tile and its partner: IHC, IF, a mask, a vector) into a data set for training.

  histokd pairs BCI_dataset --out data/bci                              layout recognised, grades from the file names
  histokd pairs BCI_dataset --out data/bci --resize 256                 resized, which the manifest records
  histokd pairs pairs.csv --out data/ours --classes 0,1+,2+,3+          table he_path,ihc_path,label,group,split
  histokd pairs lesion_1 --out data/l1 --partner-folder proSPC --label-rule none
  histokd pairs tiles/ --out data/tiles                                 single images with labels.csv, no partners

Files that cannot be used (truncated, other size than their partner, more than 8 bits, CMYK, transparent, ...) are
listed with reasons in quarantine.csv. 8-bit RGB PNG and JPEG files are stored byte for byte, others as lossless PNG.
An interrupted import is continued by the same command.

Exit code: 0 everything imported; 3 imported, but some files are in quarantine; 1 nothing was imported.
"""

from __future__ import annotations

import argparse
import os
import pathlib

HELP = "import image pairs (H&E with IHC, IF, mask or vector)"
EXIT_QUARANTINE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd pairs`."""
    parser.add_argument("source", type=pathlib.Path, metavar="SRC", help="folder of images, or table of pairs")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DATASET", help="data set to write")
    formats = ("auto", "bci", "mist", "folder", "table", "images")
    parser.add_argument("--format", choices=formats, default="auto", help="layout of SRC; default: recognise it")
    parser.add_argument("--name", help="name of the data set; default: that of the folder DATASET")
    parser.add_argument("--image-folder", default="", metavar="NAME", help="folders of H&E images; default: HE")
    parser.add_argument("--partner-folder", default="", metavar="NAME", help="folders of partners; default: IHC")
    parser.add_argument(
        "--missing-partner",
        choices=("quarantine", "refuse", "keep"),
        default="quarantine",
        help="examples without their partner; keep: they train unpaired",
    )
    parser.add_argument("--vectors", default="", metavar="FILE", help="NPZ or CSV of vectors by example_id")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="decoding threads")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in DATASET")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be done")
    _add_size_arguments(parser)
    _add_label_arguments(parser)


def _add_size_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("size of the images (default: all must have the same)")
    group.add_argument("--resize", metavar="S", help="bring all images to S x S (or HxW) pixels, recorded")
    group.add_argument("--size", metavar="S", help="leave out images of another size than S x S (or HxW)")
    group.add_argument("--multiple-of", type=int, default=1, metavar="N", help="refuse sides that N does not divide")
    group.add_argument("--mpp", type=float, help="micrometres per pixel of the stored images")


def _add_label_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labels and groups (default: HER2 grade from the file name, or as in the table)")
    group.add_argument("--label-rule", choices=("auto", "none"), default="auto", help="none: a set without labels")
    group.add_argument("--label-regex", metavar="REGEX", help="searched in the file name; its group is the label")
    group.add_argument("--label-field", type=int, metavar="I", help="field of the name, cut at underscores, from 0")
    group.add_argument("--labels", default="", metavar="TABLE", help="CSV with name (or example_id) and --label-column")
    group.add_argument("--label-column", default="label", metavar="NAME")
    group.add_argument("--classes", default="", metavar="A,B,...", help="the classes in their order")
    group.add_argument("--group-regex", default="", metavar="REGEX", help="slide or patient, searched in the file name")


def run(args: argparse.Namespace) -> int:
    """Plans and runs the import, and prints its account."""
    from data_pipelines.importers.plan import NothingUsable
    from data_pipelines.importers.run import write_quarantine

    try:
        return _plan_and_run(args)
    except NothingUsable as error:
        if not args.dry_run and not (args.out / "manifest.json").exists():
            write_quarantine(args.out, error.rejected)
        raise


def _plan_and_run(args: argparse.Namespace) -> int:
    from data_pipelines.pairs.plan import make_plan
    from histokd_jax.cli.import_features import print_rejected

    plan = make_plan(args.source, args.name or args.out.resolve().name, _options(args))
    _print_plan(plan)
    if args.dry_run:
        print_rejected(plan.listing.rejected)
        return EXIT_QUARANTINE if plan.listing.rejected else 0
    outcome = _import(plan, args)
    _print_outcome(outcome, args.out)
    print_rejected(outcome.rejected)
    return EXIT_QUARANTINE if outcome.rejected else 0


def _options(args: argparse.Namespace):
    from data_pipelines.pairs.plan import Options

    if args.multiple_of < 1 or args.workers < 1:
        raise ValueError(f"--multiple-of {args.multiple_of} and --workers {args.workers}: expected at least 1")
    if args.mpp is not None and not 0 < args.mpp < 1e6:
        raise ValueError(f"--mpp {args.mpp}: expected a positive number")
    return Options(
        layout=args.format,
        image_folder=args.image_folder,
        partner_folder=args.partner_folder,
        missing_partner=args.missing_partner,
        rule=_rule(args),
        labels=args.labels,
        label_column=args.label_column,
        classes=tuple(filter(None, args.classes.split(","))),
        group_regex=args.group_regex,
        vectors=args.vectors,
        resize=_size(args.resize, "--resize"),
        expect_size=_size(args.size, "--size"),
        multiple_of=args.multiple_of,
        mpp=args.mpp,
    )


def _rule(args: argparse.Namespace):
    from data_pipelines.pairs import labels

    given = [args.label_rule == "none", args.label_regex is not None, args.label_field is not None, bool(args.labels)]
    if sum(given) > 1:
        raise ValueError("--label-rule none, --label-regex, --label-field and --labels exclude each other: give one")
    if args.label_rule == "none":
        return labels.LabelRule(labels.NONE)
    if args.label_regex is not None:
        return labels.LabelRule(labels.REGEX, args.label_regex)
    return None if args.label_field is None else labels.LabelRule(labels.FIELD, index=args.label_field)


def _size(text: str | None, option: str) -> tuple[int, int] | None:
    """ "256" or "256x512" (height x width)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"{option} {text}: expected pixels, like 256 or 256x512 (height x width)")
    return int(sides[0]), int(sides[-1])


def _import(plan, args: argparse.Namespace):
    from tqdm import tqdm

    from data_pipelines.pairs.write import run_import

    with tqdm(total=len(plan.listing.examples), unit="example", disable=None) as bar:
        return run_import(plan, args.out, workers=args.workers, overwrite=args.overwrite, progress=bar.update)


def _print_plan(plan) -> None:
    import collections

    listing, facts = plan.listing, plan.facts
    print(f"layout: {listing.layout} ({'; '.join(listing.evidence[:3])})")
    splits = collections.Counter(example.split for example in listing.examples)
    parts = ", ".join(f"{name} {count}" for name, count in splits.items() if name) or "none given"
    counts = collections.Counter(example.label for example in listing.examples)
    labels = ", ".join(f"{name} {counts[name]}" for name in facts["class_names"])
    if counts[""]:
        labels = ", ".join(filter(None, [labels, f"without label {counts['']}"]))
    height, width = facts["image_size"]
    print(f"{len(listing.examples)} examples of {height}x{width} pixels; parts: {parts}; labels: {labels}")
    if facts["resized"]:
        print(f"  resized from {', '.join(f'{size} ({n})' for size, n in facts['resized']['from'].items())}")


def _print_outcome(outcome, out: pathlib.Path) -> None:
    manifest = outcome.manifest
    groups = len({example.group for example in manifest.examples if example.group})
    state = "was complete already, nothing changed" if outcome.already_complete else "written"
    kept = f"; {outcome.shards_kept} shards kept from an interrupted import" if outcome.shards_kept else ""
    with_partner = sum(example.has_partner for example in manifest.examples)
    known = f", {groups} groups" if groups else ""
    vector = f", vectors of {manifest.vector_size} numbers" if manifest.vector_size else ""
    print(
        f"{out}: {state}: {len(manifest.examples)} examples, {with_partner} with a partner image{vector}{known}{kept}"
    )
