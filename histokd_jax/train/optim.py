"""The optimizers as configurations name them; their rate is `schedules`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from histokd_jax.train import gradients, schedules
from histokd_jax.train.keras_adam import scale_by_keras_adam
from histokd_jax.train.rectified import lookahead, scale_by_radam
from histokd_jax.types import Stage

ADAMW, ADAM_L2, SGD, KERAS_ADAM, RADAM, LOOKAHEAD = "adamw", "adam_l2", "sgd", "keras_adam", "radam", "lookahead_radam"
OPTIMIZERS = (ADAMW, ADAM_L2, SGD, KERAS_ADAM, RADAM, LOOKAHEAD)
BETAS, EPS = (0.9, 0.999), 1e-8


def check(train: ConfigDict) -> None:
    """Refuses settings that no epoch or no optimizer could use.

    Raises:
      ValueError: naming the key, its value and what is expected.
    """
    schedules.step_rates(train, 0, 1)
    from_config(train, Stage("", (), ()), ())


def from_config(train: ConfigDict, stage: Stage, groups: Collection[str]) -> optax.GradientTransformation:
    """The optimizer of a stage by the section `train` of a configuration, see `make_optimizer`."""
    return make_optimizer(
        weight_decay=train.wd,
        decay_bias=train.decay_bias,
        trainable=stage.trainable,
        groups=groups,
        frozen=stage.frozen,
        undecayed=stage.undecayed,
        name=train.optimizer,
        betas=train.betas,
        eps=train.get("adam_eps", EPS),
        clip_norm=train.get("clip_norm", 0.0),
        clip_per_tensor=train.get("clip_per_tensor", 0.0),
        nan_fill=train.get("nan_fill", 1e-5) if gradients.nonfinite(train) == gradients.FILL else None,
    )


def make_optimizer(
    *,
    weight_decay: float,
    decay_bias: bool,
    trainable: Collection[str],
    groups: Collection[str],
    frozen: Collection[str] = (),
    undecayed: Collection[str] = (),
    name: str = ADAMW,
    betas: Sequence[float] = BETAS,
    eps: float = EPS,
    clip_norm: float = 0.0,
    clip_per_tensor: float = 0.0,
    nan_fill: float | None = None,
) -> optax.GradientTransformation:
    """Adam and relatives, or momentum, with weight decay, without the rate: the step multiplies updates by -lr.

    The rate is data, so that one compiled step serves every fold, whatever its steps per epoch. After the step follows
    `rectified.settle`.

    Args:
      weight_decay: strength of the decay.
      decay_bias: False leaves parameters of rank < 2 without decay.
      trainable: names of the top-level parameter groups that are trained; the updates of others are exactly 0.
      groups: names of all groups.
      frozen: names one level below, of parts of trained groups whose updates are exactly 0 as well.
      undecayed: names of groups without decay.
      name: adamw: decay beside the gradient, p - lr (m / (sqrt(v) + eps) + wd p); adam_l2: L2 in the gradient, Adam on
        g + wd p (G-HANet specification, check C15); sgd: heavy ball on g + wd p with momentum betas[0] (CoCoFNet
        specification, section 10); keras_adam: as adamw with Keras' place of eps, see `scale_by_keras_adam`; radam:
        rectified Adam with decay beside the gradient (SurvPath; survival_baselines, section 1); lookahead_radam: the
        same within Lookahead (TransMIL; section 8).
      betas: decay rates of the two moments, each in [0, 1); sgd has no second one.
      eps: of adamw, adam_l2 and keras_adam; radam has PyTorch's 1e-8.
      clip_norm: largest global norm of the gradient of all trained groups; 0 does not clip.
      clip_per_tensor: largest norm of the gradient of every single array; 0 does not clip.
      nan_fill: replaces NaN entries of gradients before anything else; None leaves them.

    Raises:
      ValueError: for an unknown name, betas or eps out of range, or a negative norm.
    """
    _check_optimizer(name, betas, eps)
    decay = optax.add_decayed_weights(weight_decay, mask=_decay_mask(decay_bias, undecayed))
    before = gradients.transformations(nan_fill, clip_per_tensor, clip_norm)
    chosen = optax.chain(*before, *_core(name, betas, eps, decay))
    if set(trainable) != set(groups) or frozen:
        labels = _labels(trainable, groups, frozen)
        chosen = optax.partition({"train": chosen, "frozen": optax.set_to_zero()}, labels)
    # Outermost, because it sees parameters, not updates; frozen ones stay equal to their slow copies.
    return lookahead(chosen) if name == LOOKAHEAD else chosen


def _core(
    name: str, betas: Sequence[float], eps: float, decay: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, ...]:
    if name == SGD:
        return decay, optax.trace(betas[0])
    if name in (RADAM, LOOKAHEAD):
        return scale_by_radam(*betas), decay
    if name == KERAS_ADAM:
        return scale_by_keras_adam(*betas, eps), decay
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    return (decay, adam) if name == ADAM_L2 else (adam, decay)


def _decay_mask(decay_bias: bool, undecayed: Collection[str]) -> Callable[[Any], Any] | None:
    """Which parameters are decayed; None: all."""
    if decay_bias and not undecayed:
        return None

    def decayed(path: Sequence[Any], leaf: Any) -> bool:
        return path[0].key not in undecayed and (decay_bias or leaf.ndim >= 2)

    return lambda params: jax.tree_util.tree_map_with_path(decayed, params)


def _labels(trainable: Collection[str], groups: Collection[str], frozen: Collection[str]) -> Any:
    """ "train" or "frozen" for every group or, with `frozen`, for every part of every group."""
    if not frozen:
        return {group: "train" if group in trainable else "frozen" for group in groups}
    return lambda params: {
        group: {part: "train" if group in trainable and part not in frozen else "frozen" for part in tree}
        for group, tree in params.items()
    }


def _check_optimizer(name: str, betas: Sequence[float], eps: float) -> None:
    if name not in OPTIMIZERS:
        raise ValueError(f"train.optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"train.betas={tuple(betas)!r}: expected two numbers in [0, 1), e.g. (0.9, 0.999)")
    if eps <= 0:
        raise ValueError(f"train.adam_eps={eps!r}: expected a number > 0")
    if name in (RADAM, LOOKAHEAD):
        scale_by_radam(*betas)
