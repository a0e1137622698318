"""A few functions that build escaped HTML: elements, tables, figures, the page."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from histokd_jax.report.style import CSS

VOID = frozenset({"img", "meta", "br"})


class Html(str):
    """Markup that is already escaped."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A section of the page.

    Attributes:
      anchor: its id.
      link: its name in the navigation.
      title: its heading.
      content: what it shows.
    """

    anchor: str
    link: str
    title: str
    content: Html


@dataclasses.dataclass(frozen=True)
class Body:
    """What a kind of task shows of a run.

    Attributes:
      tiles: the key numbers.
      parts: its sections.
      facts: rows of "What was trained"; "monitor" and "control" say how the epoch was chosen and what the control is.
    """

    tiles: Html
    parts: tuple[Part, ...]
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
      text: content.
      small: second, softer line, e.g. an interval.
      css: class, "num" aligns right with tabular figures.
    """

    text: str
    small: str = ""
    css: str = "num"


def element(name: str, /, *children: str, **attributes: str) -> Html:
    """An HTML element; children that are not `Html` are escaped.

    Args:
      name: tag name.
      *children: text or markup.
      **attributes: a trailing underscore is dropped (`class_`), empty values are left out.

    Returns:
      The markup.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items() if value
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Concatenate, escaping what is not markup; a per cent sign stays on the line of its number."""
    return Html(
        "".join(part if isinstance(part, Html) else html.escape(part).replace(" %", "&nbsp;%") for part in parts)
    )


def badges(marks: Sequence[str]) -> Html:
    """Small labels such as "simulated bags", shown in every caption."""
    return join(element("span", mark, class_="badge") for mark in marks)


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[Cell | str]],
    *,
    caption: str,
    marks: Sequence[str] = (),
) -> Html:
    """A table whose first column holds row headers.

    Args:
      header: column titles; a column is right-aligned if its first cell is.
      rows: cells; a row of one string is a group heading across all columns.
      caption: what the numbers are, with units.
      marks: badges in front of the caption.

    Returns:
      The markup.
    """
    rows = [tuple(row) for row in rows]
    body = join(_group_row(row[0], len(header)) if len(row) == 1 else _row(row) for row in rows)
    first = next((row for row in rows if len(row) == len(header)), ("",) * len(header))
    css = ["", *(cell.css if isinstance(cell, Cell) and cell.css == "num" else "" for cell in first[1:])]
    head = element("tr", *(element("th", text, scope="col", class_=c) for text, c in zip(header, css, strict=True)))
    content = join([element("caption", badges(marks), caption), element("thead", head), element("tbody", body)])
    return element("div", element("table", content), class_="scroll")


def figure(uri: str, *, alt: str, caption: str, marks: Sequence[str] = ()) -> Html:
    """An embedded image with alternative text and caption."""
    image = element("img", src=uri, alt=", ".join([alt, *marks]))
    return element("figure", image, element("figcaption", badges(marks), caption))


def section(anchor: str, title: str, *children: str) -> Html:
    """A titled card of the page."""
    return element("section", element("h2", title), *children, id=anchor)


def page(title: str, *children: str) -> str:
    """The whole document, with no external resource and no script."""
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", Html(CSS)),
        ]
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{element("main", *children)}</body></html>\n'


def _row(cells: Sequence[Cell | str]) -> Html:
    first, *rest = cells
    head = element("th", first.text if isinstance(first, Cell) else first, scope="row")
    return element("tr", head, *(_cell(cell) for cell in rest))


def _cell(cell: Cell | str) -> Html:
    if not isinstance(cell, Cell):
        return element("td", cell)
    small = element("span", cell.small, class_="ci") if cell.small else ""
    return element("td", cell.text, small, class_=cell.css)


def _group_row(text: str, width: int) -> Html:
    return element("tr", element("th", text, colspan=str(width), scope="rowgroup"), class_="group")
