"""Learning rates by epoch and step, as plain numbers: the compiled step takes its rate as data."""

from __future__ import annotations

import math

import numpy as np
from ml_collections import ConfigDict

WARMUP, PLATEAU = "warmup_cosine", "plateau"
SCHEDULES = (
    "constant", "cosine50_floor0", "cosine50_periodic", "cosine_to_max_epochs", "cosine_to_floor", PLATEAU, WARMUP,
)  # fmt: skip


def step_rates(train: ConfigDict, epoch: int, steps: int) -> np.ndarray:
    """Learning rate of every step of an epoch by the section `train` of a configuration.

    Args:
      train: the section; warmup_cosine also reads warmup_fraction (of all steps, rounded down; without it one epoch),
        warmup_start (rate of the first step) and lr_first_step (0: the first update has the rate of step 0; 1: that of
        step 1).
      epoch: index from 0.
      steps: steps per epoch.

    Returns:
      [steps] float64, equal unless the schedule changes per step.

    Raises:
      ValueError: as `learning_rate` and `warmup_cosine`.
    """
    if train.lr_schedule != WARMUP:
        options = {"epoch": epoch, "max_epochs": train.max_epochs, "floor": train.lr_floor}
        return np.full(steps, learning_rate(train.lr_schedule, train.lr, **options))
    if train.lr_floor:
        raise ValueError(f"train.lr_floor={train.lr_floor!r} is not read by train.lr_schedule={WARMUP}")
    first, start = train.get("lr_first_step", 0), train.get("warmup_start", 0.0)
    fraction = train.get("warmup_fraction", 1 / train.max_epochs)
    if not 0.0 <= fraction <= 1.0 or first not in (0, 1):
        raise ValueError(
            f"train.warmup_fraction={fraction!r}, train.lr_first_step={first!r}: expected a share in [0, 1], and 0 or 1"
        )
    total = train.max_epochs * steps
    shape = {"peak": train.lr, "total": total, "warmup": int(fraction * total + 1e-9), "start": start}
    return np.array([warmup_cosine(step + first, **shape) for step in range(epoch * steps, (epoch + 1) * steps)])


def warmup_cosine(step: int, *, peak: float, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """Linear warm-up, then half a cosine to 0 (More From Less, A5; SurvPath: survival_baselines, section 1).

    `a + (b - a) s / w` for s < w; `b (1 + cos(pi (s - w) / (T - w))) / 2` for w <= s <= T; 0 beyond.

    Args:
      step: s, updates done before.
      peak: b.
      total: T.
      warmup: w.
      start: a.

    Raises:
      ValueError: for T < w or b < a.
    """
    if total < warmup or peak < start:
        raise ValueError(
            f"{WARMUP}: {warmup} of {total} steps are warm-up, from {start} to {peak}: expected at most all steps, and "
            "train.warmup_start <= train.lr"
        )
    if step < warmup:
        return start + (peak - start) * step / warmup
    if step > total:
        return 0.0
    return 0.5 * peak * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def learning_rate(name: str, lr: float, *, epoch: int, max_epochs: int, floor: float = 0.0) -> float:
    """Learning rate of an epoch; it changes per epoch, not per step (MKD specification, section 7).

    Args:
      name: constant: always lr; cosine50_periodic: lr (1 + cos(pi e / 50)) / 2, which rises again after epoch 50;
        cosine50_floor0: the same, 0 from epoch 50 on; cosine_to_max_epochs: reaches 0 at `max_epochs`;
        cosine_to_floor: reaches `floor` at `max_epochs` (DSMIL; survival_baselines, section 8b); plateau: lr, which the
        loop multiplies by `stopping.Plateau.scale` (MoMKD specification, section 6).
      lr: initial rate.
      epoch: index from 0.
      max_epochs: length of the run in epochs.
      floor: train.lr_floor in [0, lr], read by cosine_to_floor only, so that another schedule refuses one.

    Raises:
      ValueError: for an unknown name, one that changes within an epoch, or a floor that is out of range or not read.
    """
    if name not in SCHEDULES:
        raise ValueError(f"train.lr_schedule={name!r}: expected one of {', '.join(SCHEDULES)}")
    if name == WARMUP:
        raise ValueError(f"train.lr_schedule={name} changes at every step: see `step_rates`")
    if not 0.0 <= floor <= lr:
        raise ValueError(f"train.lr_floor={floor!r}: expected a rate from 0 to train.lr={lr}")
    if floor and name != "cosine_to_floor":
        raise ValueError(f"train.lr_floor={floor!r} is read by train.lr_schedule=cosine_to_floor only, not by {name}")

    if name in ("constant", PLATEAU):
        return lr
    period = max_epochs if name in ("cosine_to_max_epochs", "cosine_to_floor") else 50
    if name != "cosine50_periodic":
        epoch = min(epoch, period)
    return floor + (lr - floor) * (1.0 + math.cos(math.pi * epoch / period)) / 2.0
