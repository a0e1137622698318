"""Plain label or clinical tables: `case_id` and one column per label, one row per case."""

from __future__ import annotations

from data_pipelines.table_sources import rows
from data_pipelines.table_sources.contents import Contents, Options
from data_pipelines.table_sources.foreign import Foreign
from data_pipelines.table_sources.mcat import CENSORSHIP, TIME

_OURS = ("time_months", "event")


def evidence(file: Foreign) -> list[str]:
    """See `detect.Source`."""
    others = _others(file)
    if "case_id" not in file.header or "slide_id" in file.header or not others:
        return []
    return [f"columns case_id, {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}; one row per case"]


def read(file: Foreign, options: Options) -> Contents:
    """See `detect.Source`."""
    named, follow_up = rows.named_columns(options), {}
    pair, censored = ((TIME, CENSORSHIP), True) if TIME in file.header else (_OURS, False)
    known = pair if set(pair) <= set(file.header) and not named else ()
    labels = [n for n in options.label_columns or _others(file) if n not in named and n not in known]
    table = rows.keyed(file, {name: name for name in ("case_id", *labels, *named, *known)})
    if known:
        follow_up = {"os": rows.follow_up_of(table, file, *pair, censored=censored)}
    found, dropped = rows.labels_of(table, labels, file, options)
    return Contents(
        labels=found,
        follow_up=follow_up or rows.named_follow_up(table, file, options),
        left_out=dropped,
    )


def _others(file: Foreign) -> list[str]:
    return [name for name in file.header if name and name != "case_id" and not name.startswith("Unnamed:")]
