"""Learning-rate schedules and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("cosine50_floor0", "cosine50_periodic", "cosine_to_max_epochs", "constant")


def learning_rate(name: str, lr: float, *, steps_per_epoch: int, max_epochs: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate as a function of the step; it changes per epoch, as the MKD specification (section 7) states.

    Args:
      name: cosine50_periodic: lr (1 + cos(pi e / 50)) / 2, which rises again after epoch 50; cosine50_floor0: the same,
        0 from epoch 50 on; cosine_to_max_epochs: reaches 0 at `max_epochs`; constant.
      lr: initial rate.
      steps_per_epoch: optimizer steps per epoch.
      max_epochs: length of the run in epochs.

    Raises:
      ValueError: for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"train.lr_schedule={name!r}: expected one of {', '.join(SCHEDULES)}")

    def schedule(step):
        epoch = jnp.asarray(step) // steps_per_epoch
        if name == "constant":
            return jnp.full(epoch.shape, lr)
        period = max_epochs if name == "cosine_to_max_epochs" else 50
        if name != "cosine50_periodic":
            epoch = jnp.minimum(epoch, period)
        return lr * (1.0 + jnp.cos(math.pi * epoch / period)) / 2.0

    return schedule


def make_optimizer(
    schedule, *, weight_decay: float, decay_bias: bool, trainable: Collection[str], groups: Collection[str]
) -> optax.GradientTransformation:
    """AdamW (betas 0.9, 0.999, eps 1e-8, decoupled decay) over the trainable groups; the others do not move.

    Args:
      schedule: step -> learning rate.
      weight_decay: decoupled weight decay.
      decay_bias: False leaves parameters of rank < 2 without decay.
      trainable: names of the top-level parameter groups that are trained.
      groups: names of all groups.
    """
    mask = None if decay_bias else lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay, mask=mask)
    if set(trainable) == set(groups):
        return adamw
    labels = {group: "train" if group in trainable else "frozen" for group in groups}
    return optax.partition({"train": adamw, "frozen": optax.set_to_zero()}, labels)
