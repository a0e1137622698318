"""Check a data set with its tables and splits before training: joins, leakage, censoring, classes, features.

  histokd validate data/brca                                            the data set and the tables in its folder
  histokd validate data/brca --tables tcga_brca_all_clean.csv.zip --splits splits/5foldcv/tcga_brca
  histokd validate data/ours --tables labels.csv --task ER --splits splits --json report.json

Tables are recognised by their columns: labels (case_id and the task), follow-up (time_months and event, or
survival_months and censorship, 1 = censored), genes. Several tables may be given.

Exit code: 0 nothing is wrong; 3 a training would be wrong (errors are listed first); 1 the data set cannot be read.
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "check a data set with its tables and splits"
EXIT_WRONG = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd validate`."""
    parser.add_argument("dataset", type=pathlib.Path, metavar="DATASET")
    parser.add_argument("--tables", nargs="+", metavar="FILE", help="default: the files of DATASET/tables")
    parser.add_argument("--splits", metavar="DIR", help="folder of splits_K.csv files, or one such file")
    parser.add_argument("--task", default="", metavar="NAMES", help="label columns, separated by commas")
    parser.add_argument("--label-map", metavar="TEXT=CLASS,...", help="cells of the label column -> class index")
    parser.add_argument("--quick", action="store_true", help="do not read the features")
    parser.add_argument("--checksums", action="store_true", help="also compare the SHA-256 of the shards")
    parser.add_argument("--accept", default="", metavar="CODES", help="errors that are known: warn only")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="also write everything, with all ids, as JSON"
    )
    parser.add_argument("--threads", type=int, default=2, help="that read features")


def run(args: argparse.Namespace) -> int:
    """Checks, prints, and says by the exit code whether training would be right."""
    from tqdm import tqdm

    from data_pipelines import table_files
    from data_pipelines.validate.run import validate

    with tqdm(unit="slide", disable=None) as bar:
        report = validate(
            args.dataset,
            tables=args.tables,
            splits=args.splits,
            tasks=_names(args.task),
            label_map=parse_label_map(args.label_map),
            quick=args.quick,
            full_checksum=args.checksums,
            accept=_names(args.accept),
            threads=args.threads,
            progress=bar.update,
        )
    print("\n".join(lines(report)))
    if args.json:
        table_files.write_json(args.json, report.as_dict())
        print(f"report: {args.json}")
    return 0 if report.ok else EXIT_WRONG


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def parse_label_map(text: str | None) -> dict[str, int] | None:
    """`LUAD=0,LUSC=1` as a mapping; None if nothing is given.

    Raises:
      ValueError: an entry is not TEXT=CLASS.
    """
    if not text:
        return None
    entries = {}
    for item in text.split(","):
        name, equals, value = item.rpartition("=")
        if not equals or not value.strip().isdecimal():
            raise ValueError(f"--label-map {item!r}: expected TEXT=CLASS with a class index 0, 1, ...")
        entries[name.strip()] = int(value)
    return entries


def lines(report) -> list[str]:
    """The report for people."""
    sections = report.sections
    shown = [_dataset(sections["dataset"])]
    for name, facts in sections["tables"].items():
        shown += _table(name, facts)
    if sections.get("folds"):
        shown += _folds(sections["folds"])
    if "features" in sections:
        f = sections["features"]
        shown.append(
            f"features  mean {f['mean']:.4g}, std {f['std']:.4g}, range {f['smallest']:.4g} to {f['largest']:.4g}, "
            f"{len(f['constant_dimensions'])} constant dimensions, {len(f['duplicates'])} groups of equal slides"
        )
    for finding in report.findings:
        shown.append(f"{finding.level:8}  [{finding.code}] {finding.message}")
    count = {level: sum(item.level == level for item in report.findings) for level in ("error", "warning")}
    verdict = "nothing is wrong" if report.ok else "a training on this would be wrong"
    return [*shown, f"{count['error']} errors, {count['warning']} warnings: {verdict}"]


def _dataset(facts: dict) -> str:
    told = f", encoder {facts['encoder'].get('name')}" if facts["encoder"] else ""
    told += ", SIMULATED" if facts["simulated"] else ""
    return (
        f"data set  {facts['name']}: {facts['slides']} slides of {facts['cases']} cases, {facts['patches']} patches of "
        f"width {facts['width']} ({facts['dtype']}), bags of {facts['smallest_bag']} to {facts['largest_bag']}{told}"
    )


def _table(name: str, facts: dict) -> list[str]:
    shown = [
        f"table     {name}: {facts['cases']} cases, {facts['cases_matched']} with slides, "
        f"{len(facts['cases_without_slides'])} without; {len(facts['cases_of_the_dataset_not_listed'])} cases of the "
        f"data set not listed"
    ]
    for task, found in facts.get("tasks", {}).items():
        shown.append(f"            {task}: {', '.join(f'{name} {count}' for name, count in found['classes'].items())}")
    if "survival" in facts:
        found = facts["survival"]
        shown.append(
            f"            follow-up of {found['cases_with_follow_up']} cases, {found['events']} events, median "
            f"{_shown(found['median_months'])} months ({_shown(found['median_months_with_event'])} with event, "
            f"{_shown(found['median_months_censored'])} censored)"
        )
    return shown


def _shown(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def _folds(facts: list[dict]) -> list[str]:
    shown = ["fold      train / val / test cases; the same per class; events; sites shared with test"]
    for fold in facts:
        cells = ["/".join(str(fold["cases"][part]) for part in ("train", "val", "test"))]
        if "classes" in fold:
            names = fold["classes"]["train"]
            parts = ("train", "val", "test")
            cells += [f"{name} {'/'.join(str(fold['classes'][part][name]) for part in parts)}" for name in names]
        if "events" in fold:
            cells.append(f"events {'/'.join(str(fold['events'][part]) for part in ('train', 'val', 'test'))}")
        cells.append(f"sites {len(fold['sites_shared_with_test'])}")
        shown.append(f"  {fold['fold']:<8}{'  '.join(cells)}")
    return shown
