"""Labels of image pairs: by a rule on the file name, or as given (CoCoFNet specification, sections 2.1 and 2.3)."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from data_pipelines.errors import DataError

HER2_PATTERN = r"_(0|1\+|2\+|3\+)\.[A-Za-z0-9]+$"
"""The last field of the name, before its extension: fits names of three and of four fields (deviation D8)."""
HER2_CLASSES = ("0", "1+", "2+", "3+")
REGEX, FIELD, NONE = "regex", "field", "none"
KINDS = (REGEX, FIELD, NONE)
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """How the label follows from a file name.

    Attributes:
      kind: "regex": group 1 (or all) of what `pattern` finds; "field": field `index` of the name without its extension,
        cut at underscores (as released: index 3); "none": examples have no label.
      pattern: regular expression, searched in the file name with its extension.
      index: number of the field, from 0.
    """

    kind: str = REGEX
    pattern: str = HER2_PATTERN
    index: int = 3

    def __post_init__(self):
        if self.kind not in KINDS:
            raise DataError(f"label rule {self.kind!r} is unknown; choose one of {KINDS}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise DataError(f"the label rule {self.pattern!r} is no regular expression: {error}") from error

    def label(self, name: str) -> str | None:
        """The label of a file, or None if the rule does not match."""
        if self.kind == FIELD:
            fields = name.rpartition(".")[0].split("_")
            return fields[self.index] if self.index < len(fields) else None
        found = re.search(self.pattern, name)
        return None if found is None else found.group(1 if found.re.groups else 0)

    def text(self) -> str:
        """For messages and manifests."""
        return {REGEX: f"regular expression {self.pattern}", FIELD: f"field {self.index}", NONE: "no labels"}[self.kind]


def apply(rule: LabelRule, names: Sequence[str]) -> list[str]:
    """Labels of all files.

    Raises:
      DataError: the rule does not match some of them; gives their number, the first ones and the fix.
    """
    if rule.kind == NONE:
        return [""] * len(names)
    labels = [rule.label(name) for name in names]
    missed = [name for name, label in zip(names, labels) if not label]
    if missed:
        raise DataError(
            f"the label rule ({rule.text()}) does not match {len(missed)} of {len(names)} file names, first "
            f"{', '.join(missed[:SHOWN])}: give another rule with --label-regex or --label-field, a table with "
            "--labels, or --label-rule none for a set without labels"
        )
    return labels


def class_names(labels: Sequence[str], given: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes in their order.

    Args:
      labels: of all examples; empty ones have none.
      given: the classes, if the order or an absent class matters; default: the labels found, sorted (HER2 grades: all
        four, if no other label occurs).

    Raises:
      DataError: a label that is no given class.
    """
    found = Counter(label for label in labels if label)
    if given:
        unknown = [label for label in sorted(found) if label not in given]
        if unknown or len(set(given)) != len(given):
            counts = ", ".join(f"{label!r} ({found[label]})" for label in unknown[:SHOWN])
            raise DataError(f"--classes {','.join(given)}: not among them, or twice: {counts or list(given)}")
        return tuple(given)
    if set(found) <= set(HER2_CLASSES) and any("+" in label for label in found):
        return HER2_CLASSES
    return tuple(sorted(found))
