"""Tables of other projects as ours: labels, survival, genes, slides, availability, gene groups and splits.

  histokd tables tcga_brca_all_clean.csv.zip --out data/brca          MCAT, PORPOISE: recognised by their columns
  histokd tables datasets_csv --study blca --out data/blca            SurvPath: metadata, clinical, RNA, pathways
  histokd tables data_mrna_seq_v2_rsem_zscores_ref_all_samples.txt data_clinical_patient.txt --out data/ours
  histokd tables clini.xlsx slide.csv --out data/crc --time-column days --event-column status --time-unit days

SRC may be several files of one cohort: MCAT, PORPOISE, SurvPath, MMP, Patho-Bench, CLAM, GigaPath, STAMP, MADELEINE,
cBioPortal, plain label or expression tables, gene groups, split files. They are merged; files that contradict one
another are refused. OUT is a data set (its folder tables/ is used) or any folder. account-LAYOUT.json says what was
kept, what was left out and why. What a case lacks is absent and 0 in availability.csv, never a row of zeros.
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "turn MCAT, SurvPath, CLAM, STAMP, cBioPortal, ... tables into ours"
FORMATS = ("auto", "mcat", "survpath", "patho-bench", "mmp", "stamp", "cbioportal", "splits", "madeleine", "clam")
FORMATS += ("expression", "labels", "groups")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd tables`."""
    parser.add_argument("source", type=pathlib.Path, nargs="+", metavar="SRC", help="files, or a folder of tables")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="OUT", help="data set, or a folder")
    known = f"layout of every SRC: {', '.join(FORMATS)}; default: auto"
    parser.add_argument("--format", choices=FORMATS, default="auto", metavar="LAYOUT", help=known)
    parser.add_argument("--study", default="", metavar="NAME", help="cohort of a folder that holds several, e.g. blca")
    parser.add_argument(
        "--pathways", default="", metavar="NAME", help="collection of a SurvPath folder: xena, hallmarks, combine"
    )
    parser.add_argument("--by", choices=("case", "slide"), default="case", help="what a label belongs to")
    parser.add_argument("--label-columns", default="", metavar="NAMES", help="label columns, separated by commas")
    parser.add_argument(
        "--conflicts", choices=("refuse", "drop"), default="refuse", help="labels of a case that differ"
    )
    parser.add_argument("--only", default="", metavar="KINDS", help="write these only: labels, survival, genes, ...")
    parser.add_argument("--overwrite", action="store_true", help="replace tables of other content")
    group = parser.add_argument_group("survival")
    group.add_argument(
        "--endpoint", default="os", metavar="NAME", help="that becomes time_months and event: os (default), dss, pfi"
    )
    group.add_argument("--time-column", default="", metavar="NAME", help="follow-up of a table with names of its own")
    group.add_argument("--event-column", default="", metavar="NAME", help="1 = event")
    group.add_argument("--censorship-column", default="", metavar="NAME", help="1 = censored")
    group.add_argument("--time-unit", choices=("months", "days", "years"), default="months", help="of --time-column")
    group = parser.add_argument_group("expression")
    group.add_argument("--outliers", choices=("exact", "clip", "rank"), default="exact", help="default: exact")
    group.add_argument(
        "--clip", type=float, default=10.0, metavar="BOUND", help="bound of --outliers clip; default: 10"
    )
    group.add_argument("--sample-type", type=int, metavar="CODE", help="TCGA sample type, e.g. 6 for metastases")


def run(args: argparse.Namespace) -> int:
    """Reads, merges, writes, and prints the account."""
    from data_pipelines.table_sources import detect, write
    from data_pipelines.table_sources.contents import Options

    options = Options(
        **{name: getattr(args, name) for name in ("by", "time_column", "event_column", "censorship_column")},
        **{name: getattr(args, name) for name in ("time_unit", "sample_type", "study", "pathways", "conflicts")},
        label_columns=_names(args.label_columns),
    )
    found = detect.read_all(args.source, options, args.format)
    for item in found:
        print(f"{item.path.name}: {item.layout} ({'; '.join(item.evidence[:3])})")
    request = write.Request(args.endpoint, args.outliers, args.clip, _names(args.only), args.overwrite)
    done = write.write_tables(found, args.out, options, request)
    print("\n".join(lines(done.account)))
    state = f"{len(done.changed)} written" if done.changed else "nothing changed"
    print(f"{done.folder}: {', '.join(done.files)} ({state})")
    return 0


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def lines(account) -> list[str]:
    """The account for people."""
    cases = account["cases"]
    shown = [f"cases     {cases['n']}; {cases['slides']} slides, {cases['with_several_slides']} cases with several"]
    if cases["not_tcga"] and len(cases["not_tcga"]) < cases["n"]:
        shown.append(f"          {len(cases['not_tcga'])} ids are no TCGA barcodes: {', '.join(cases['not_tcga'][:3])}")
    shown += _table_lines(account["tables"])
    if joined := account.get("dataset"):
        shown.append(
            f"data set  {joined['cases_matched']} of its {joined['cases']} cases are in the tables; "
            f"{len(joined['cases_without_slides'])} cases of the tables have no slides"
        )
        shown += [f"          {joined['hint']}"] if joined["hint"] else []
    for item in account["left_out"]:
        names = ", ".join(item["names"][:3]) + (", ..." if item["n"] > 3 else "")
        shown.append(f"left out  {item['n']} {item['what']}{'s' * (item['n'] > 1)} ({names}): {item['reason']}")
    shown += [f"note      {note}" for note in account["notes"]]
    return shown + [f"warning   {warning}" for warning in account["warnings"]]


def _table_lines(tables) -> list[str]:
    shown = []
    for name, facts in tables.get("labels.csv", {}).get("columns", {}).items():
        values = facts.get("values")
        told = ", ".join(f"{k} {v}" for k, v in values.items()) if values else f"{facts.get('distinct', 0)} values"
        shown.append(f"label     {name}: {told}; {facts['not_available']} not available")
    for name, facts in tables.get("survival.csv", {}).items():
        shown.append(
            f"survival  {name}: {facts['cases']} cases, {facts['events']} events, {facts['without_follow_up']} without "
            "follow-up"
        )
    if facts := tables.get("genes.npz"):
        kinds = ", ".join(f"{count} {kind}" for kind, count in facts["columns"].items())
        shown.append(f"genes     {facts['cases']} cases: {kinds}; {facts['missing_values']} values missing")
    if facts := tables.get("availability.csv"):
        shown.append(f"available {', '.join(f'{name} {count}' for name, count in facts.items())}")
    if facts := tables.get("groups/signatures.csv"):
        shown.append(f"groups    {len(facts)} of {min(facts.values())} to {max(facts.values())} genes")
    for number, parts in tables.get("splits", {}).items():
        shown.append(f"fold {number}    {', '.join(f'{part} {count}' for part, count in parts.items())}")
    return shown
