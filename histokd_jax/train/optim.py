"""Learning-rate schedules and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from histokd_jax.train.rectified import lookahead, scale_by_radam

WARMUP = "warmup_cosine"
SCHEDULES = ("constant", "cosine50_floor0", "cosine50_periodic", "cosine_to_max_epochs", "cosine_to_floor", WARMUP)
PER_STEP = (WARMUP,)
"""Schedules that change within an epoch."""
ADAMW, ADAM_L2, SGD, RADAM, LOOKAHEAD = "adamw", "adam_l2", "sgd", "radam", "lookahead_radam"
OPTIMIZERS = (ADAMW, ADAM_L2, SGD, RADAM, LOOKAHEAD)
BETAS = (0.9, 0.999)


def check(train: ConfigDict) -> None:
    """Refuses settings of the section `train` that this module does not know, before anything is compiled.

    Raises:
      ValueError: naming the key, its value and what is expected.
    """
    step_rates(train, 0, 1)
    _check_optimizer(train.optimizer, train.betas)


def step_rates(train: ConfigDict, epoch: int, steps: int) -> np.ndarray:
    """Learning rate of every step of an epoch by the section `train` of a configuration, see `learning_rate`.

    Args:
      train: the section.
      epoch: index from 0.
      steps: steps per epoch.

    Returns:
      [steps] float64, equal unless the schedule changes per step.
    """

    def rate(when: float) -> float:
        floor, epochs = train.lr_floor, train.max_epochs
        return learning_rate(train.lr_schedule, train.lr, epoch=when, max_epochs=epochs, floor=floor)

    if train.lr_schedule in PER_STEP:
        return np.array([rate(epoch + step / steps) for step in range(steps)])
    return np.full(steps, rate(epoch))


def learning_rate(name: str, lr: float, *, epoch: float, max_epochs: int, floor: float = 0.0) -> float:
    """Learning rate; it changes per epoch, not per step (MKD specification, section 7), but for `PER_STEP`.

    Args:
      name: constant: always lr; cosine50_periodic: lr (1 + cos(pi e / 50)) / 2, which rises again after epoch 50;
        cosine50_floor0: the same, 0 from epoch 50 on; cosine_to_max_epochs: reaches 0 at `max_epochs`;
        cosine_to_floor: reaches `floor` at `max_epochs` (DSMIL; survival_baselines, section 8b); warmup_cosine: rises
        evenly from 0 at the first step to lr after one epoch, then a cosine to 0 at `max_epochs`, step by step
        (SurvPath; survival_baselines, section 1).
      lr: initial rate; the highest of warmup_cosine.
      epoch: index from 0; warmup_cosine also reads its fraction, steps done / steps per epoch.
      max_epochs: length of the run in epochs.
      floor: train.lr_floor in [0, lr], read by cosine_to_floor only, so that another schedule refuses one.

    Raises:
      ValueError: for an unknown name, or a floor that is out of range or not read.
    """
    if name not in SCHEDULES:
        raise ValueError(f"train.lr_schedule={name!r}: expected one of {', '.join(SCHEDULES)}")
    if not 0.0 <= floor <= lr:
        raise ValueError(f"train.lr_floor={floor!r}: expected a rate from 0 to train.lr={lr}")
    if floor and name != "cosine_to_floor":
        raise ValueError(f"train.lr_floor={floor!r} is read by train.lr_schedule=cosine_to_floor only, not by {name}")

    if name == "constant":
        return lr
    if name == WARMUP:
        return lr * epoch if epoch < 1 else lr * (1.0 + math.cos(math.pi * (epoch - 1) / max(max_epochs - 1, 1))) / 2.0
    period = max_epochs if name in ("cosine_to_max_epochs", "cosine_to_floor") else 50
    if name != "cosine50_periodic":
        epoch = min(epoch, period)
    return floor + (lr - floor) * (1.0 + math.cos(math.pi * epoch / period)) / 2.0


def make_optimizer(
    *,
    weight_decay: float,
    decay_bias: bool,
    trainable: Collection[str],
    groups: Collection[str],
    name: str = ADAMW,
    betas: Sequence[float] = BETAS,
) -> optax.GradientTransformation:
    """Adam (eps 1e-8) and relatives, or momentum, with weight decay, without the rate: the step multiplies by -lr.

    The rate is data, so that one compiled step serves every fold, whatever its steps per epoch. After the step follows
    `rectified.settle`.

    Args:
      weight_decay: strength of the decay.
      decay_bias: False leaves parameters of rank < 2 without decay.
      trainable: names of the top-level parameter groups that are trained; the updates of others are exactly 0.
      groups: names of all groups.
      name: adamw: decay beside the gradient, p - lr (m / (sqrt(v) + eps) + wd p); adam_l2: L2 in the gradient, Adam on
        g + wd p (G-HANet specification, check C15); sgd: heavy ball on g + wd p with momentum betas[0] (CoCoFNet
        specification, section 10); radam: rectified Adam with decay beside the gradient (SurvPath; survival_baselines,
        section 1); lookahead_radam: the same within Lookahead (TransMIL; section 8).
      betas: decay rates of the two moments, each in [0, 1); sgd has no second one.

    Raises:
      ValueError: for an unknown name, or betas out of range.
    """
    _check_optimizer(name, betas)
    mask = None if decay_bias else lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    decay = optax.add_decayed_weights(weight_decay, mask=mask)
    chosen = _chain(name, betas, decay)
    if set(trainable) != set(groups):
        labels = {group: "train" if group in trainable else "frozen" for group in groups}
        chosen = optax.partition({"train": chosen, "frozen": optax.set_to_zero()}, labels)
    # Outermost, because it sees parameters, not updates; frozen ones stay equal to their slow copies.
    return lookahead(chosen) if name == LOOKAHEAD else chosen


def _chain(name: str, betas: Sequence[float], decay: optax.GradientTransformation) -> optax.GradientTransformation:
    if name == SGD:
        return optax.chain(decay, optax.trace(betas[0]))
    if name in (RADAM, LOOKAHEAD):
        return optax.chain(scale_by_radam(*betas), decay)
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=1e-8)
    return optax.chain(decay, adam) if name == ADAM_L2 else optax.chain(adam, decay)


def _check_optimizer(name: str, betas: Sequence[float]) -> None:
    if name not in OPTIMIZERS:
        raise ValueError(f"train.optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"train.betas={tuple(betas)!r}: expected two numbers in [0, 1), e.g. (0.9, 0.999)")
    if name in (RADAM, LOOKAHEAD):
        scale_by_radam(*betas)
