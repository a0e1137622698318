"""Learning-rate schedules and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

PLATEAU = "plateau"
SCHEDULES = ("constant", "cosine50_floor0", "cosine50_periodic", "cosine_to_max_epochs", "cosine_to_floor", PLATEAU)
ADAMW, ADAM_L2, SGD = "adamw", "adam_l2", "sgd"
OPTIMIZERS = (ADAMW, ADAM_L2, SGD)
BETAS = (0.9, 0.999)


def check(train: ConfigDict) -> None:
    """Refuses settings of the section `train` that this module does not know, before anything is compiled.

    Raises:
      ValueError: naming the key, its value and what is expected.
    """
    epoch_rate(train, 0)
    _check_optimizer(train.optimizer, train.betas)


def epoch_rate(train: ConfigDict, epoch: int) -> float:
    """Learning rate of an epoch by the section `train` of a configuration, see `learning_rate`."""
    return learning_rate(train.lr_schedule, train.lr, epoch=epoch, max_epochs=train.max_epochs, floor=train.lr_floor)


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
      ValueError: for an unknown name, or a floor that is out of range or not read.
    """
    if name not in SCHEDULES:
        raise ValueError(f"train.lr_schedule={name!r}: expected one of {', '.join(SCHEDULES)}")
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


def make_optimizer(
    *,
    weight_decay: float,
    decay_bias: bool,
    trainable: Collection[str],
    groups: Collection[str],
    name: str = ADAMW,
    betas: Sequence[float] = BETAS,
    clip_norm: float = 0.0,
    undecayed: Collection[str] = (),
) -> optax.GradientTransformation:
    """Adam (eps 1e-8) or momentum with weight decay, without its rate: the step multiplies updates by -lr.

    The rate is data, so that one compiled step serves every fold, whatever its steps per epoch.

    Args:
      weight_decay: strength of the decay.
      decay_bias: False leaves parameters of rank < 2 without decay.
      trainable: names of the top-level parameter groups that are trained; the updates of others are exactly 0.
      groups: names of all groups.
      name: adamw: decay beside the gradient, p - lr (m / (sqrt(v) + eps) + wd p); adam_l2: L2 in the gradient, Adam on
        g + wd p (G-HANet specification, check C15); sgd: heavy ball on g + wd p with momentum betas[0] (CoCoFNet
        specification, section 10).
      betas: decay rates of the two moments, each in [0, 1); sgd has no second one.
      clip_norm: largest global norm of the gradient of all trained groups; 0 does not clip.
      undecayed: names of groups without decay.

    Raises:
      ValueError: for an unknown name, betas out of range, or a negative norm.
    """
    _check_optimizer(name, betas)
    if clip_norm < 0.0:
        raise ValueError(f"train.clip_norm={clip_norm!r}: expected a norm > 0, or 0 for no clipping")
    decay = optax.add_decayed_weights(weight_decay, mask=_decay_mask(decay_bias, undecayed))
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=1e-8)
    chosen = {
        ADAMW: optax.chain(adam, decay),
        ADAM_L2: optax.chain(decay, adam),
        SGD: optax.chain(decay, optax.trace(betas[0])),
    }[name]
    if clip_norm:
        chosen = optax.chain(optax.clip_by_global_norm(clip_norm), chosen)
    if set(trainable) == set(groups):
        return chosen
    labels = {group: "train" if group in trainable else "frozen" for group in groups}
    return optax.partition({"train": chosen, "frozen": optax.set_to_zero()}, labels)


def _decay_mask(decay_bias: bool, undecayed: Collection[str]) -> Callable[[Any], Any] | None:
    """Which parameters are decayed; None: all."""
    if decay_bias and not undecayed:
        return None

    def decayed(path: Sequence[Any], leaf: Any) -> bool:
        return path[0].key not in undecayed and (decay_bias or leaf.ndim >= 2)

    return lambda params: jax.tree_util.tree_map_with_path(decayed, params)


def _check_optimizer(name: str, betas: Sequence[float]) -> None:
    if name not in OPTIMIZERS:
        raise ValueError(f"train.optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"train.betas={tuple(betas)!r}: expected two numbers in [0, 1), e.g. (0.9, 0.999)")
