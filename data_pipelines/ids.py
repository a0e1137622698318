"""Ids that do not match: which typical mistake would explain it. A leaf module."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def bare_slide_id(text: str) -> str:
    """A slide id or file name without the extension of a slide or feature file."""
    return re.sub(r"\.(svs|ndpi|mrxs|tiff?|h5|pt)$", "", text)


_ALTERED: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("leading zeros were kept", lambda text: text.lstrip("0")),
    ("upper and lower case agreed", str.casefold),
    ("file extensions were removed", bare_slide_id),
    ("only the first 12 characters (the patient of a TCGA barcode) were used", lambda text: text[:12]),
    ("dashes and underscores agreed", lambda text: text.replace("_", "-")),
    ("blanks were removed", lambda text: text.replace(" ", "")),
)


def near_matches(some_ids: Sequence[str], others: Sequence[str]) -> str:
    """A hint for a message if unmatched ids would match after a typical mistake is undone.

    Args:
      some_ids: unmatched ids of one side.
      others: unmatched ids of the other side.

    Returns:
      "; 12 would match if leading zeros were kept, e.g. '7' and '007'", or "".
    """
    hints = []
    for condition, alter in _ALTERED:
        altered = {alter(other): other for other in others}
        pairs = [(item, altered[alter(item)]) for item in some_ids if alter(item) in altered]
        if pairs:
            hints.append(f"{len(pairs)} would match if {condition}, e.g. {pairs[0][0]!r} and {pairs[0][1]!r}")
    return f"; {'; '.join(hints)}" if hints else ""
