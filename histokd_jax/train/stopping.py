"""Early stopping as a pure state transition."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Stopper:
    """What early stopping remembers.

    Attributes:
      best: best monitor value so far (None before the first epoch).
      best_epoch: its epoch index, from 0.
      bad_epochs: epochs since then; a tie counts as no improvement.
    """

    best: float | None = None
    best_epoch: int = -1
    bad_epochs: int = 0

    def update(self, value: float, epoch: int) -> tuple[Stopper, bool]:
        """The state after an epoch, and whether this epoch is the best so far."""
        if self.best is None or value > self.best:
            return Stopper(value, epoch, 0), True
        return dataclasses.replace(self, bad_epochs=self.bad_epochs + 1), False

    def should_stop(self, epoch: int, *, patience: int, min_epoch: int) -> bool:
        """True if `patience` epochs in a row brought nothing and the epoch index exceeds `min_epoch`."""
        return self.bad_epochs >= patience and epoch > min_epoch
