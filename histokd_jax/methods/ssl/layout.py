"""Branches as lists of numbers: what each reads, which encoder and projector it passes (specification, section 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

IMAGE, PARTNER = "image", "partner"
UNPRIVILEGED, PRIVILEGED, TRIDENT, PRIVILEGED_ONLY = "unprivileged", "privileged", "trident", "privileged_only"
SKIP = -1
"""In the place of a projector: the encoder's output is the embedding."""
PRIMARY_ENCODER, PRIVILEGED_ENCODER = 0, 1
_NAMED: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    UNPRIVILEGED: ((IMAGE, IMAGE), (0, 0)),
    PRIVILEGED: ((IMAGE, PARTNER), (0, 1)),
    TRIDENT: ((IMAGE, IMAGE, PARTNER), (0, 0, 1)),
    PRIVILEGED_ONLY: ((PARTNER, PARTNER), (1, 1)),
}
LAYOUTS = tuple(_NAMED)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The branches of a run; equal numbers share weights.

    Attributes:
      inputs: batch field that each branch reads.
      encoders: number of the encoder of each branch.
      projectors: number of the projector of each branch, or `SKIP`.
    """

    inputs: tuple[str, ...]
    encoders: tuple[int, ...]
    projectors: tuple[int, ...]

    @property
    def branches(self) -> int:
        """How many there are."""
        return len(self.inputs)

    def reads_partner(self) -> bool:
        """Whether any branch needs the privileged view."""
        return PARTNER in self.inputs

    def input_of(self, encoder: int) -> tuple[str, ...]:
        """The batch fields that an encoder reads, each once."""
        return tuple(dict.fromkeys(i for i, e in zip(self.inputs, self.encoders) if e == encoder))

    def groups(self) -> tuple[str, ...]:
        """Names of all networks: encoders, then projectors, by number."""
        encoders, projectors = sorted(set(self.encoders)), sorted(set(self.projectors) - {SKIP})
        return (*map(encoder_group, encoders), *map(projector_group, projectors))


def encoder_group(number: int) -> str:
    """Name of the parameter group of an encoder."""
    return f"encoder_{number}"


def projector_group(number: int) -> str:
    """Name of the parameter group of a projector."""
    return f"projector_{number}"


def make_layout(
    name: str,
    *,
    share_primary: bool = True,
    encoders: Sequence[int] = (),
    projectors: Sequence[int] = (),
    own_projectors: bool = False,
) -> Layout:
    """The branches of a named layout.

    Args:
      name: one of `LAYOUTS`.
      share_primary: False gives the second primary branch an encoder and projector of its own.
      encoders: numbers in the place of those of the layout; empty: those.
      projectors: likewise; a list that is shorter than the branches leaves the others without projector; empty: the
        numbers of the encoders.
      own_projectors: whether every branch gets a projector of its own where none are given.

    Raises:
      ValueError: an unknown name, a list of another length, or a number that is none.
    """
    if name not in _NAMED:
        raise ValueError(f"layout.name={name!r} is unknown; choose one of {LAYOUTS}")
    inputs, numbers = _NAMED[name]
    if not share_primary:
        numbers = _distinct(numbers, [kind == IMAGE for kind in inputs])
    if encoders:
        numbers = tuple(encoders)
        if len(numbers) != len(inputs) or min(numbers) < 0:
            raise ValueError(
                f"layout.encoders={numbers}: layout {name} has {len(inputs)} branches, each needs a number >= 0"
            )
    return Layout(inputs, numbers, _projectors(name, numbers, tuple(projectors), own_projectors))


def _projectors(name: str, encoders: tuple[int, ...], given: tuple[int, ...], own: bool) -> tuple[int, ...]:
    if not given:
        return _distinct(encoders, [True] * len(encoders)) if own else encoders
    if len(given) > len(encoders) or min(given) < SKIP:
        raise ValueError(
            f"layout.projectors={given}: layout {name} has {len(encoders)} branches; give a number >= 0 for each, or "
            f"{SKIP} for none"
        )
    return given + (SKIP,) * (len(encoders) - len(given))


def _distinct(numbers: Sequence[int], may_change: Sequence[bool]) -> tuple[int, ...]:
    """Numbers with a new one for every repetition that may change."""
    found, free = [], max(*numbers, PRIVILEGED_ENCODER) + 1
    for number, changeable in zip(numbers, may_change):
        repeated = changeable and number in found
        found.append(free if repeated else number)
        free += repeated
    return tuple(found)
