"""Accumulation windows: which patients of which epoch form one update (G-HANet specification, section 6 and D19)."""

from __future__ import annotations

import dataclasses

from data_pipelines.errors import DataError

CARRY, DROP, FLUSH = "carry", "drop", "flush_scaled"
REMAINDERS = (CARRY, DROP, FLUSH)


@dataclasses.dataclass(frozen=True)
class Window:
    """One update.

    Attributes:
      samples: (epoch, index of the draw within the epoch) of every patient.
      divisor: the sum of their gradients is divided by it.
    """

    samples: tuple[tuple[int, int], ...]
    divisor: int


def accumulation_windows(num_draws: int, window: int, epochs: int, remainder: str) -> list[list[Window]]:
    """Updates of every epoch when gradients are accumulated over windows.

    Args:
      num_draws: patients drawn per epoch.
      window: patients per update.
      epochs: number of epochs.
      remainder: what happens to the last `num_draws % window` patients of an epoch: "carry", their gradients stay and
        join the first update of the next epoch, still divided by `window` (after the last epoch they are lost); "drop",
        nothing; "flush_scaled", an update of their own, divided by their number.

    Returns:
      Per epoch the list of its updates.

    Raises:
      DataError: an unknown option, or fewer draws than a window where nothing would ever be updated.
    """
    if remainder not in REMAINDERS:
        raise DataError(f"train.remainder={remainder!r} is unknown; choose one of {REMAINDERS}")
    if window < 1 or (num_draws < window and remainder != FLUSH):
        raise DataError(f"{num_draws} patients per epoch never fill a window of {window}; lower train.b")
    updates, waiting = [], ()
    full = num_draws // window * window
    for epoch in range(epochs):
        draws = [(epoch, i) for i in range(num_draws)]
        own = [Window(tuple(draws[i : i + window]), window) for i in range(0, full, window)]
        if waiting:
            own[0] = Window((*waiting, *own[0].samples), window)
        rest = tuple(draws[full:])
        if rest and remainder == FLUSH:
            own.append(Window(rest, len(rest)))
        waiting = rest if remainder == CARRY else ()
        updates.append(own)
    return updates
