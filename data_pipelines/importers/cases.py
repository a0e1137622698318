"""Which patient a slide belongs to: from its TCGA barcode, a regular expression, or a table."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Sequence

from data_pipelines import tcga, text_table
from data_pipelines.bag import check_key
from data_pipelines.errors import BagError, DataError
from data_pipelines.importers.sources import slide_id_of

_SLIDE_COLUMNS = ("slide_id", "FILENAME", "filename", "slide")
_CASE_COLUMNS = ("case_id", "PATIENT", "pat_id", "patient_id", "patient")
_MPP_COLUMN = "level0_mpp"


@dataclasses.dataclass(frozen=True)
class CaseRule:
    """How case ids are found; of the three ways at most one is given, and without any the TCGA barcode is used.

    Attributes:
      regex: searched in the slide id; its group `case`, else its first group, else the whole match is the case id.
      table: file with a slide and a case column (slide_id, case_id; STAMP's and GigaPath's names are known), and
        optionally level0_mpp.
      own: every slide is a case of its own.
    """

    regex: str | None = None
    table: str | None = None
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Assigned:
    """The cases of slides.

    Attributes:
      case_of: slide id -> case id.
      level0_mpp: slide id -> micrometres per level-0 pixel, where the table has it.
      not_listed: slides that the table does not list.
      no_file: slides of the table without a file.
      rule: how it was done, for people.
    """

    case_of: dict[str, str]
    level0_mpp: dict[str, float]
    not_listed: tuple[str, ...] = ()
    no_file: tuple[str, ...] = ()
    rule: str = ""


def assign(slide_ids: Sequence[str], rule: CaseRule) -> Assigned:
    """Finds the case of every slide.

    Args:
      slide_ids: unique slide ids.
      rule: how.

    Returns:
      The cases; slides that a table does not list are named there and have no case.

    Raises:
      DataError: several ways are given, the regular expression is bad or matches not all slides, or no way is given
        and not all ids are TCGA barcodes.
    """
    if sum(map(bool, (rule.regex, rule.table, rule.own))) > 1:
        raise DataError("give at most one of --case-regex, --cases and --case-per-slide")
    if rule.table:
        return _from_table(slide_ids, pathlib.Path(rule.table))
    if rule.own:
        return Assigned({slide: slide for slide in slide_ids}, {}, rule="every slide is a case of its own")
    if rule.regex:
        return Assigned(_by_regex(slide_ids, rule.regex), {}, rule=f"regular expression {rule.regex!r}")
    other = [slide for slide in slide_ids if tcga.patient_of(slide) is None]
    if other:
        raise DataError(
            f"{len(other)} of {len(slide_ids)} slide ids are no TCGA barcodes ({text_table.listed(other[:3])}), so "
            f"their patients are unknown; give --cases TABLE, --case-regex REGEX or, if every slide is a patient, "
            f"--case-per-slide"
        )
    return Assigned({slide: slide[:12] for slide in slide_ids}, {}, rule="TCGA barcode, first 12 characters")


def _by_regex(slide_ids: Sequence[str], regex: str) -> dict[str, str]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise DataError(f"--case-regex {regex!r} is no regular expression: {error}") from error
    found = {}
    for slide in slide_ids:
        match = pattern.search(slide)
        case = match and (match["case"] if "case" in pattern.groupindex else match[1 if pattern.groups else 0])
        if not case:
            raise DataError(f"--case-regex {regex!r} finds no case in the slide id {slide!r}")
        found[slide] = case
    return found


def _from_table(slide_ids: Sequence[str], path: pathlib.Path) -> Assigned:
    table = text_table.read_text_table(path)
    slide_column, case_column = (_column(table.columns, names, path) for names in (_SLIDE_COLUMNS, _CASE_COLUMNS))
    mpps = table[_MPP_COLUMN] if _MPP_COLUMN in table.columns else [""] * len(table)
    wanted = {key: slide for slide in slide_ids for key in _spellings(slide)}
    case_of, mpp_of, no_file = {}, {}, []
    for line, (name, case, mpp) in enumerate(zip(table[slide_column], table[case_column], mpps), 2):
        where = f"{path}, line {line}"
        slide = wanted.get(_listed_id(name, where))
        if slide is None:
            no_file.append(name)
            continue
        _check(case, slide, where)
        if case_of.setdefault(slide, case) != case:
            raise DataError(f"{where}: slide {slide!r} has case {case!r} here and {case_of[slide]!r} before")
        if mpp:
            mpp_of[slide] = _positive(mpp, where)
    rest = tuple(slide for slide in slide_ids if slide not in case_of)
    return Assigned(case_of, mpp_of, rest, tuple(no_file), f"table {path.name}, column {case_column}")


def _column(found: Sequence[str], known: Sequence[str], path: pathlib.Path) -> str:
    for name in known:
        if name in found:
            return name
    raise DataError(f"{path}: none of the columns {', '.join(known)}; the file has {text_table.listed(found)}")


def _spellings(slide: str) -> tuple[str, ...]:
    return (slide, re.sub(r"\.(svs|ndpi|mrxs|tiff?)$", "", slide))


def _listed_id(name: str, where: str) -> str:
    """The slide id that a cell of the table means: a file name keeps its name only, without a known suffix."""
    plain = unicodedata.normalize("NFC", name)
    if not plain or plain.startswith("/") or ".." in re.split(r"[/\\]", plain):
        raise DataError(f"{where}: {name!r} is no slide id; expected a name without '..' and without a leading '/'")
    return _spellings(slide_id_of(re.split(r"[/\\]", plain)[-1]))[-1]


def _check(case: str, slide: str, where: str) -> None:
    try:
        check_key(case, "case_id", slide)
    except BagError as error:
        raise DataError(f"{where}: {error}") from error


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 100:
        raise DataError(f"{where}, column {_MPP_COLUMN!r}: {text!r} is no size of a pixel in micrometres")
    return value
