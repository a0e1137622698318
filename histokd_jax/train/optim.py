"""Learning-rate schedules and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
import optax

SCHEDULES = ("cosine50_floor0", "cosine50_periodic", "cosine_to_max_epochs")


def learning_rate(name: str, lr: float, *, epoch: int, max_epochs: int) -> float:
    """Learning rate of an epoch; it changes per epoch, not per step (MKD specification, section 7).

    Args:
      name: cosine50_periodic: lr (1 + cos(pi e / 50)) / 2, which rises again after epoch 50; cosine50_floor0: the same,
        0 from epoch 50 on; cosine_to_max_epochs: reaches 0 at `max_epochs`.
      lr: initial rate.
      epoch: index from 0.
      max_epochs: length of the run in epochs.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"train.lr_schedule={name!r}: expected one of {', '.join(SCHEDULES)}")

    period = max_epochs if name == "cosine_to_max_epochs" else 50
    if name != "cosine50_periodic":
        epoch = min(epoch, period)
    return lr * (1.0 + math.cos(math.pi * epoch / period)) / 2.0


def make_optimizer(
    *, weight_decay: float, decay_bias: bool, trainable: Collection[str], groups: Collection[str]
) -> optax.GradientTransformation:
    """AdamW (betas 0.9, 0.999, eps 1e-8, decoupled decay) without its rate: the step multiplies updates by -lr.

    The rate is data, so that one compiled step serves every fold, whatever its steps per epoch.

    Args:
      weight_decay: decoupled weight decay.
      decay_bias: False leaves parameters of rank < 2 without decay.
      trainable: names of the top-level parameter groups that are trained; the updates of others are exactly 0.
      groups: names of all groups.
    """
    mask = None if decay_bias else lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    adamw = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8), optax.add_decayed_weights(weight_decay, mask=mask)
    )
    if set(trainable) == set(groups):
        return adamw
    labels = {group: "train" if group in trainable else "frozen" for group in groups}
    return optax.partition({"train": adamw, "frozen": optax.set_to_zero()}, labels)
