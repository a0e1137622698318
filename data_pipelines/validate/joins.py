"""Joins tables with the slides of a dataset: what matches, what does not on either side, and why perhaps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from data_pipelines import tables, text_table
from data_pipelines.ids import bare_slide_id, near_matches
from data_pipelines.manifest import Manifest
from data_pipelines.sites import tissue_source_site
from data_pipelines.validate.findings import ERROR, NOTE, WARNING, Finding, some


def read_ids(path: str | os.PathLike) -> pd.DataFrame:
    """The columns case_id, slide_id and site of a table, those it has; genes.npz has case_id only.

    Raises:
      DataError: unreadable, or no case_id.
    """
    if str(path).endswith(".npz"):
        return pd.DataFrame({"case_id": list(tables.read_gene_npz(path).case_id)})
    table = text_table.read_header(path)
    wanted = [name for name in ("case_id", "slide_id", "site") if name in table]
    return text_table.read_text_table(path, ["case_id", *(name for name in wanted if name != "case_id")])


def join(name: str, ids: pd.DataFrame, manifest: Manifest) -> tuple[dict[str, Any], list[Finding]]:
    """Compares the cases (and slides, where listed) of a table with those of the dataset.

    Args:
      name: of the table, for messages.
      ids: from `read_ids`.
      manifest: of the dataset.

    Returns:
      Counts and the unmatched ids of both sides, and the findings.
    """
    listed, held = list(dict.fromkeys(ids["case_id"])), list(dict.fromkeys(s.case_id for s in manifest.slides))
    both = set(listed) & set(held)
    without_slides, without_row = ([i for i in a if i not in both] for a in (listed, held))
    facts = {
        "rows": len(ids),
        "cases": len(listed),
        "cases_matched": len(both),
        "cases_without_slides": without_slides,
        "cases_of_the_dataset_not_listed": without_row,
    }
    findings = _unmatched(name, without_slides, without_row, len(both))
    if "slide_id" in ids:
        more, found = _join_slides(name, ids, manifest)
        facts |= more
        findings += found
    if "site" in ids:
        findings += _lost_zeros(name, ids)
    return facts, findings


def _unmatched(name: str, tabled: Sequence[str], held: Sequence[str], matched: int) -> list[Finding]:
    hint = near_matches(tabled, held)
    if not matched:
        text = f"{name}: no case matches the data set ({some(tabled)} against {some(held)}){hint}"
        return [Finding(ERROR, "no_match", text, tuple(held))]
    found = []
    if held:
        text = f"{name}: {len(held)} cases of the data set are not listed ({some(held)}){hint}"
        found.append(Finding(WARNING if hint else NOTE, "not_listed", text, tuple(held)))
    if tabled:
        text = f"{name}: {len(tabled)} cases have no slides ({some(tabled)})"
        found.append(Finding(NOTE, "no_slides", text, tuple(tabled)))
    return found


def _join_slides(name: str, ids: pd.DataFrame, manifest: Manifest) -> tuple[dict[str, Any], list[Finding]]:
    case_of = {bare_slide_id(slide.slide_id): slide.case_id for slide in manifest.slides}
    rows = {bare_slide_id(slide): (slide, case) for slide, case in zip(ids["slide_id"], ids["case_id"]) if slide}
    missing = [slide for key, (slide, _) in rows.items() if key not in case_of]
    unlisted = [slide.slide_id for slide in manifest.slides if bare_slide_id(slide.slide_id) not in rows]
    other = [
        f"{slide}: {case} / {case_of[key]}" for key, (slide, case) in rows.items() if case_of.get(key, case) != case
    ]
    facts = {"slides": len(rows), "slides_without_features": missing, "slides_of_the_dataset_not_listed": unlisted}
    findings = []
    if other:
        text = f"{name}: {len(other)} slides belong to other cases in the table than in the data set ({some(other)})"
        findings.append(Finding(ERROR, "other_case", text, tuple(other)))
    return facts, findings


def _lost_zeros(name: str, ids: pd.DataFrame) -> list[Finding]:
    pairs = [(case, site, tissue_source_site(case)) for case, site in zip(ids["case_id"], ids["site"])]
    lost = [case for case, site, code in pairs if code and site != code and site == code.lstrip("0")]
    if not lost:
        return []
    text = (
        f"{name}: column site lost the leading zero of {len(lost)} rows ({some(lost)}); sites are taken from barcodes"
    )
    return [Finding(NOTE, "site_zeros", text, tuple(lost))]


def several_slides(manifest: Manifest) -> tuple[dict[str, Any], list[Finding]]:
    """Cases with several slides, of which training on cases uses one (`data.slide_choice`)."""
    cases, counts = np.unique([slide.case_id for slide in manifest.slides], return_counts=True)
    more = [str(case) for case in cases[counts > 1]]
    facts = {"slides": len(manifest.slides), "cases": len(cases), "cases_with_several_slides": len(more)}
    if not more:
        return facts, []
    text = f"{len(more)} of {len(cases)} cases have several slides (up to {counts.max()}); one stands for the case"
    return facts, [Finding(NOTE, "several_slides", text, tuple(more))]
