"""Early stopping, and rates that fall on a plateau, as pure state transitions."""

from __future__ import annotations

import dataclasses

_LEAST_GAIN = 1e-4  # relative, as in the scheduler that the published code uses


@dataclasses.dataclass(frozen=True)
class Stopper:
    """What early stopping remembers.

    Attributes:
      best: best monitor value so far (None before the first epoch).
      best_epoch: its epoch index, from 0.
      bad_epochs: epochs since then.
    """

    best: float | None = None
    best_epoch: int = -1
    bad_epochs: int = 0

    def update(self, value: float, epoch: int, ties_improve: bool = False) -> tuple[Stopper, bool]:
        """The state after an epoch, and whether this epoch is the best so far (or, if ties count, as good)."""
        if self.best is None or value > self.best or (ties_improve and value == self.best):
            return Stopper(value, epoch, 0), True
        return dataclasses.replace(self, bad_epochs=self.bad_epochs + 1), False

    def should_stop(self, epoch: int, *, patience: int, min_epoch: int) -> bool:
        """True if `patience` epochs in a row brought nothing and the epoch index exceeds `min_epoch`."""
        return self.bad_epochs >= patience and epoch > min_epoch


@dataclasses.dataclass(frozen=True)
class Plateau:
    """What a learning rate that falls on a plateau remembers (MoMKD specification, section 6).

    Attributes:
      best: best monitor value so far (None before the first epoch).
      bad_epochs: epochs since it, or since the last reduction.
      reductions: how often the rate was reduced.
    """

    best: float | None = None
    bad_epochs: int = 0
    reductions: int = 0

    def update(self, value: float, patience: int) -> Plateau:
        """The state after an epoch: more than `patience` epochs without a gain of 0.01 % reduce the rate."""
        if self.best is None or value > self.best * (1.0 + _LEAST_GAIN):
            return dataclasses.replace(self, best=value, bad_epochs=0)
        if self.bad_epochs < patience:
            return dataclasses.replace(self, bad_epochs=self.bad_epochs + 1)
        return dataclasses.replace(self, bad_epochs=0, reductions=self.reductions + 1)

    def scale(self, factor: float) -> float:
        """What the rate is multiplied by."""
        return factor**self.reductions
