"""Writes the tables of a cohort beside a data set, with an account of what was kept, what was left out and why."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import atomic, survival, tables, tcga
from data_pipelines.errors import DataError
from data_pipelines.follow_up import SurvivalTable
from data_pipelines.genes import GeneTable
from data_pipelines.ids import near_matches
from data_pipelines.manifest import MANIFEST_FILE, Manifest, sha256_file
from data_pipelines.table_sources import layout, outliers
from data_pipelines.table_sources.contents import OVERALL, Contents, LeftOut, Options, merge
from data_pipelines.table_sources.detect import Found
from data_pipelines.text_table import listed


@dataclasses.dataclass(frozen=True)
class Request:
    """What to write.

    Attributes:
      endpoint: which follow-up becomes time_months and event.
      outliers: policy for expression, see `outliers.apply`.
      clip: bound of the policy "clip".
      only: kinds of tables to write, of `layout.KINDS`; empty: all.
      overwrite: replace files of other content.
    """

    endpoint: str = OVERALL
    outliers: str = outliers.EXACT
    clip: float = 10.0
    only: tuple[str, ...] = ()
    overwrite: bool = False


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
      folder: where the tables lie.
      files: relative names of all files, of which `changed` are new or replaced.
      changed: see `files`.
      account: the content of the account.
    """

    folder: pathlib.Path
    files: tuple[str, ...]
    changed: tuple[str, ...]
    account: Mapping[str, Any]


def write_tables(found: Sequence[Found], out: pathlib.Path, options: Options, request: Request) -> Written:
    """Merges what was read and writes it.

    Args:
      found: from `detect.read_all`.
      out: a data set, whose folder `tables` is used, or any other folder.
      options: with which the files were read.
      request: what to write.

    Returns:
      The account; equal sources and options give equal bytes.

    Raises:
      DataError: the files contradict one another, no case is in the data set, a fold shares patients, nothing is left
        to write, or files of other content exist.
      StorageError: the disk is full or not writable.
    """
    contents = merge([item.contents for item in found])
    manifest = Manifest.load(out) if (out / MANIFEST_FILE).exists() else None
    joined = _join(contents, manifest)
    held = None if manifest is None else {slide.case_id for slide in manifest.slides}
    files, facts, left_out = _files(contents, held, options, request)
    if not files:
        raise DataError(f"nothing to write: the files hold no {', '.join(request.only) or 'table'}")
    account = {
        "sources": [entry for item in found for entry in _source(item)],
        "options": _given(options) | _chosen(request),
        "tables": facts,
        "cases": _case_facts(contents),
        "left_out": _grouped([*contents.left_out, *left_out]),
        "notes": list(dict.fromkeys(contents.notes)),
        "warnings": _warnings(contents, request),
        **({"dataset": joined} if joined else {}),
    }
    folder = out / "tables" if manifest is not None else out
    files[account_name(found)] = (json.dumps(account, indent=2, allow_nan=False) + "\n").encode()
    return Written(folder, tuple(files), _publish(folder, files, request.overwrite), account)


def account_name(found: Sequence[Found]) -> str:
    """Name of the account: one file per layout, so that labels and genes may come from different sources."""
    return f"account-{'-'.join(dict.fromkeys(item.layout for item in found))}.json"


def _files(
    contents: Contents, held: set[str] | None, options: Options, request: Request
) -> tuple[dict[str, bytes], dict[str, Any], list[LeftOut]]:
    """Files by name, facts about each, and what had no value at all."""
    unknown = set(request.only) - set(layout.KINDS)
    if unknown:
        raise DataError(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(layout.KINDS)}")
    wanted = set(request.only or layout.KINDS)
    files: dict[str, bytes] = {}
    facts: dict[str, Any] = {}
    left_out: list[LeftOut] = []
    if contents.labels and "labels" in wanted:
        files[layout.LABELS] = layout.label_table(contents.labels)
        facts[layout.LABELS] = {"keyed_by": options.by, "columns": _label_facts(contents.labels)}
    if contents.follow_up and "survival" in wanted:
        files[layout.SURVIVAL] = layout.survival_table(contents.follow_up, request.endpoint)
        facts[layout.SURVIVAL] = {name: _survival_facts(table) for name, table in contents.follow_up.items()}
    if contents.genes is not None and "genes" in wanted:
        genes, without = layout.measured(contents.genes)
        left_out = [LeftOut("case", case, "no molecular value") for case in without]
        prepared = outliers.apply(genes, request.outliers, scale=contents.scale, limit=request.clip)
        files[layout.GENES] = tables.gene_table_bytes(prepared)
        if prepared is not genes:
            files[layout.EXACT_GENES] = tables.gene_table_bytes(genes)
        facts[layout.GENES] = _gene_facts(genes, contents.scale)
    if contents.slides and "slides" in wanted:
        files[layout.SLIDES] = layout.slide_table(contents.slides)
    modalities = layout.availability(contents, held)
    if len(modalities) > 1 and "availability" in wanted:
        files[layout.AVAILABILITY] = layout.availability_table(modalities)
        facts[layout.AVAILABILITY] = {name: sum(values.values()) for name, values in modalities.items()}
    if contents.groups and "groups" in wanted:
        files[layout.GROUPS] = layout.group_table(contents.groups)
        facts[layout.GROUPS] = {name: len(genes) for name, genes in contents.groups.items()}
    if contents.folds and "splits" in wanted:
        for number, parts in sorted(contents.folds.items()):
            layout.check_fold(number, parts, contents.slides)
            files[f"splits/splits_{number}.csv"] = layout.split_table(parts)
        facts["splits"] = {str(n): {part: len(ids) for part, ids in p.items()} for n, p in contents.folds.items()}
    return files, facts, left_out


def _publish(folder: pathlib.Path, files: Mapping[str, bytes], overwrite: bool) -> tuple[str, ...]:
    """Writes the files that differ, each atomically, the account last; nothing if one must not be replaced."""
    stored = {name: (folder / name).read_bytes() if (folder / name).exists() else None for name in files}
    changed = [name for name, content in files.items() if stored[name] != content]
    other = [name for name in changed if stored[name] is not None]
    if other and not overwrite:
        raise DataError(
            f"{folder}: {', '.join(other)} exist with other content; pass --overwrite, choose another folder, or write "
            "some tables only (--only)"
        )
    with atomic.storage_errors(folder):
        for name in changed:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(atomic.write_temporary(target.parent, target.name, files[name]), target)
    return tuple(changed)


def _join(contents: Contents, manifest: Manifest | None) -> dict[str, Any]:
    """How the cases of the tables and of a data set match; empty without a data set.

    Raises:
      DataError: no case matches.
    """
    cases = contents.cases()
    if manifest is None or not cases:
        return {}
    held = sorted({slide.case_id for slide in manifest.slides})
    both = set(cases) & set(held)
    without_slide, without_row = ([case for case in side if case not in both] for side in (cases, held))
    if not both:
        raise DataError(
            f"none of the {len(cases)} cases of the tables is in the data set {manifest.name!r}: "
            f"{listed(without_slide[:3])} against {listed(without_row[:3])}{near_matches(without_slide, without_row)}"
        )
    return {
        "cases": len(held),
        "cases_matched": len(both),
        "cases_without_slides": without_slide,
        "cases_without_a_row": without_row,
        "hint": near_matches(without_slide, without_row).lstrip("; "),
    }


def _source(item: Found) -> list[dict[str, Any]]:
    folder = item.path.is_dir()
    paths = sorted(item.path.rglob("*.csv")) if folder else [item.path]
    names = [path.relative_to(item.path).as_posix() if folder else path.name for path in paths]
    return [
        {"file": name, "sha256": sha256_file(path), "layout": item.layout, "evidence": list(item.evidence)}
        for name, path in zip(names, paths)
    ]


def _given(options: Options) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(options).items() if value not in ("", (), None)}


def _chosen(request: Request) -> dict[str, Any]:
    chosen = {"endpoint": request.endpoint, "outliers": request.outliers}
    return chosen | ({"clip": request.clip} if request.outliers == outliers.CLIP else {})


def _label_facts(labels: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    facts = {}
    for column, values in labels.items():
        counts = collections.Counter(text for text in values.values() if text)
        facts[column] = {"available": counts.total(), "not_available": len(values) - counts.total()}
        facts[column] |= {"values": dict(sorted(counts.items()))} if len(counts) <= 12 else {"distinct": len(counts)}
    return facts


def _survival_facts(table: SurvivalTable) -> dict[str, Any]:
    known = np.isfinite(table.survival.time_months)
    median = float(np.median(table.survival.time_months[known])) if known.any() else None
    return {
        "cases": int(known.sum()),
        "events": int(table.survival.event[known].sum()),
        "without_follow_up": int((~known).sum()),
        "median_months": median,
    }


def _gene_facts(genes: GeneTable, scale: str) -> dict[str, Any]:
    return {
        "cases": len(genes.case_id),
        "columns": {kind: sum(name.endswith(f"_{kind}") for name in genes.names) for kind in layout.kinds_of(genes)},
        "missing_values": int(np.isnan(genes.values).sum()),
        "scale": scale,
        "outliers": outliers.account(genes) if scale == outliers.Z_SCORE else {},
    }


def _case_facts(contents: Contents) -> dict[str, Any]:
    cases = contents.cases()
    slides = collections.Counter(contents.slides.values())
    return {
        "n": len(cases),
        "slides": len(contents.slides),
        "with_several_slides": sum(count > 1 for count in slides.values()),
        "most_slides": max(slides.values(), default=0),
        "not_tcga": [case for case in cases if tcga.patient_of(case) is None],
    }


def _grouped(items: Sequence[LeftOut]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for item in items:
        groups.setdefault((item.what, item.reason), []).append(item.name)
    return [
        {"what": what, "reason": reason, "n": len(names), "names": names} for (what, reason), names in groups.items()
    ]


def _warnings(contents: Contents, request: Request) -> list[str]:
    found = []
    for endpoint, table in contents.follow_up.items():
        known = np.isfinite(table.survival.time_months)
        evidence = survival.censorship_evidence(table.survival.time_months[known], table.survival.event[known])
        if evidence.suspicious:
            found.append(evidence.message(f"follow-up {endpoint}"))
    wild = outliers.account(contents.genes) if contents.genes is not None and contents.scale == outliers.Z_SCORE else {}
    if wild.get("values_beyond") and request.outliers == outliers.EXACT:
        found.append(
            f"{wild['values_beyond']} z-scores of {wild['genes_beyond']} genes lie beyond {outliers.WILD:g}, up to "
            f"{wild['largest']:.0f} ({wild['largest_gene']}): kept as they are; --outliers clip or rank tames them, or "
            "genes.clip in training"
        )
    return found
