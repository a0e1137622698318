"""What a check found: a level, a code, a sentence, and the ids concerned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

ERROR, WARNING, NOTE = "error", "warning", "note"
LEVELS = (ERROR, WARNING, NOTE)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
      level: ERROR if a training would be wrong, WARNING if it may be, NOTE otherwise.
      code: short name, by which it can be accepted.
      message: one sentence with the numbers.
      ids: all ids concerned.
    """

    level: str
    code: str
    message: str
    ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks of a dataset.

    Attributes:
      sections: name -> JSON-serialisable facts.
      findings: sorted by level.
    """

    sections: Mapping[str, Any]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(finding.level != ERROR for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable content."""
        return {"ok": self.ok, **self.sections, "findings": [dataclasses.asdict(item) for item in self.findings]}


def make_report(sections: Mapping[str, Any], findings: Sequence[Finding], accepted: Sequence[str] = ()) -> Report:
    """Sorts the findings; errors with an accepted code become warnings that say so."""
    done = []
    for item in findings:
        if item.level == ERROR and item.code in accepted:
            item = dataclasses.replace(item, level=WARNING, message=f"{item.message} (accepted)")
        done.append(item)
    return Report(dict(sections), tuple(sorted(done, key=lambda item: LEVELS.index(item.level))))


def some(ids: Sequence[str], count: int = 3) -> str:
    """The first few ids, for a message."""
    return ", ".join(map(str, ids[:count])) + (", ..." if len(ids) > count else "")
