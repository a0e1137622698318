"""Learning-rate schedules and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

SCHEDULES = ("constant", "cosine50_floor0", "cosine50_periodic", "cosine_to_max_epochs", "cosine_to_floor")
WARMUP_COSINE = "warmup_cosine"
"""The schedule that changes at every step, see `warmup_cosine`."""
ADAMW, ADAM_L2, SGD, KERAS_ADAM = "adamw", "adam_l2", "sgd", "keras_adam"
OPTIMIZERS = (ADAMW, ADAM_L2, SGD, KERAS_ADAM)
BETAS, EPS = (0.9, 0.999), 1e-8
RAISE, SKIP, FILL = "raise", "skip", "fill"
NONFINITE = (RAISE, SKIP, FILL)
"""What happens to a step whose loss or gradients are not finite (train.nonfinite): the run ends with its epoch; the
step changes nothing and is counted; or NaN entries of gradients become train.nan_fill (More From Less, A5)."""


def check(train: ConfigDict) -> None:
    """Refuses settings of the section `train` that this module does not know, before anything is compiled.

    Raises:
      ValueError: naming the key, its value and what is expected.
    """
    step_rate(train, 0, 1)
    _check_optimizer(train.optimizer, train.betas)
    if train.get("adam_eps", EPS) <= 0 or train.get("clip_per_tensor", 0.0) < 0:
        raise ValueError(
            f"train.adam_eps={train.get('adam_eps', EPS)} and train.clip_per_tensor={train.get('clip_per_tensor', 0.0)}"
            ": expected eps > 0 and a norm > 0, or 0 for no clipping"
        )
    if nonfinite(train) not in NONFINITE:
        raise ValueError(f"train.nonfinite={nonfinite(train)!r}: expected one of {', '.join(NONFINITE)}")


def nonfinite(train: ConfigDict) -> str:
    """train.nonfinite, one of `NONFINITE`."""
    return train.get("nonfinite", RAISE)


def step_rate(train: ConfigDict, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step by the section `train` of a configuration.

    Args:
      train: with lr_schedule "warmup_cosine" also warmup_fraction (of all steps, rounded down), warmup_start (rate of
        the first step) and lr_first_step (0: the first update has the rate of step 0; 1: that of step 1).
      step: index from 0 within the stage.
      steps_per_epoch: steps of an epoch.

    Raises:
      ValueError: as `learning_rate` and `warmup_cosine`.
    """
    if train.lr_schedule != WARMUP_COSINE:
        return epoch_rate(train, step // steps_per_epoch)
    if train.lr_floor:
        raise ValueError(f"train.lr_floor={train.lr_floor!r} is not read by train.lr_schedule={WARMUP_COSINE}")
    fraction, first = train.get("warmup_fraction", 0.0), train.get("lr_first_step", 0)
    if not 0.0 <= fraction <= 1.0 or first not in (0, 1):
        raise ValueError(
            f"train.warmup_fraction={fraction!r}, train.lr_first_step={first!r}: expected a share in [0, 1], and 0 or 1"
        )
    total = train.max_epochs * steps_per_epoch
    warmup = int(fraction * total + 1e-9)
    return warmup_cosine(step + first, peak=train.lr, total=total, warmup=warmup, start=train.get("warmup_start", 0.0))


def warmup_cosine(step: int, *, peak: float, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """Linear warm-up, then half a cosine to 0 (More From Less, A5).

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
            f"{WARMUP_COSINE}: {warmup} of {total} steps are warm-up, from {start} to {peak}: expected at most all "
            "steps, and train.warmup_start <= train.lr"
        )
    if step < warmup:
        return start + (peak - start) * step / warmup
    if step > total:
        return 0.0
    return 0.5 * peak * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def epoch_rate(train: ConfigDict, epoch: int) -> float:
    """Learning rate of an epoch by the section `train` of a configuration, see `learning_rate`.

    Raises:
      ValueError: as `learning_rate`; or the schedule changes at every step.
    """
    if train.lr_schedule == WARMUP_COSINE:
        raise ValueError(
            f"train.lr_schedule={WARMUP_COSINE} changes at every step, but trainings that share a program change their "
            f"rate with the epoch: choose one of {', '.join(SCHEDULES)}, or train them one by one"
        )
    return learning_rate(train.lr_schedule, train.lr, epoch=epoch, max_epochs=train.max_epochs, floor=train.lr_floor)


def learning_rate(name: str, lr: float, *, epoch: int, max_epochs: int, floor: float = 0.0) -> float:
    """Learning rate of an epoch; it changes per epoch, not per step (MKD specification, section 7).

    Args:
      name: constant: always lr; cosine50_periodic: lr (1 + cos(pi e / 50)) / 2, which rises again after epoch 50;
        cosine50_floor0: the same, 0 from epoch 50 on; cosine_to_max_epochs: reaches 0 at `max_epochs`;
        cosine_to_floor: reaches `floor` at `max_epochs` (DSMIL; survival_baselines, section 8b).
      lr: initial rate.
      epoch: index from 0.
      max_epochs: length of the run in epochs.
      floor: train.lr_floor in [0, lr], read by cosine_to_floor only, so that another schedule refuses one.

    Raises:
      ValueError: for an unknown name, or a floor that is out of range or not read.
    """
    if name not in SCHEDULES:
        raise ValueError(f"train.lr_schedule={name!r}: expected one of {', '.join((*SCHEDULES, WARMUP_COSINE))}")
    if not 0.0 <= floor <= lr:
        raise ValueError(f"train.lr_floor={floor!r}: expected a rate from 0 to train.lr={lr}")
    if floor and name != "cosine_to_floor":
        raise ValueError(f"train.lr_floor={floor!r} is read by train.lr_schedule=cosine_to_floor only, not by {name}")

    if name == "constant":
        return lr
    period = max_epochs if name in ("cosine_to_max_epochs", "cosine_to_floor") else 50
    if name != "cosine50_periodic":
        epoch = min(epoch, period)
    return floor + (lr - floor) * (1.0 + math.cos(math.pi * epoch / period)) / 2.0


def from_config(train: ConfigDict, trainable: Collection[str], groups: Collection[str]) -> optax.GradientTransformation:
    """The optimizer of a stage by the section `train` of a configuration, see `make_optimizer`."""
    return make_optimizer(
        weight_decay=train.wd,
        decay_bias=train.decay_bias,
        trainable=trainable,
        groups=groups,
        name=train.optimizer,
        betas=train.betas,
        eps=train.get("adam_eps", EPS),
        clip_per_tensor=train.get("clip_per_tensor", 0.0),
        nan_fill=train.get("nan_fill", 1e-5) if nonfinite(train) == FILL else None,
    )


def make_optimizer(
    *,
    weight_decay: float,
    decay_bias: bool,
    trainable: Collection[str],
    groups: Collection[str],
    name: str = ADAMW,
    betas: Sequence[float] = BETAS,
    eps: float = EPS,
    clip_per_tensor: float = 0.0,
    nan_fill: float | None = None,
) -> optax.GradientTransformation:
    """Adam or momentum with weight decay, without its rate: the step multiplies updates by -lr.

    The rate is data, so that one compiled step serves every fold, whatever its steps per epoch.

    Args:
      weight_decay: strength of the decay.
      decay_bias: False leaves parameters of rank < 2 without decay.
      trainable: names of the top-level parameter groups that are trained; the updates of others are exactly 0.
      groups: names of all groups.
      name: adamw: decay beside the gradient, p - lr (m / (sqrt(v) + eps) + wd p); adam_l2: L2 in the gradient, Adam on
        g + wd p (G-HANet specification, check C15); sgd: heavy ball on g + wd p with momentum betas[0] (CoCoFNet
        specification, section 10); keras_adam: as adamw with Keras' place of eps, see `scale_by_keras_adam`.
      betas: decay rates of the two moments, each in [0, 1); sgd has no second one.
      eps: of Adam.
      clip_per_tensor: largest norm of the gradient of every single array (before the decay); 0 for no limit.
      nan_fill: replaces NaN entries of gradients before anything else; None leaves them.

    Raises:
      ValueError: for an unknown name, or betas out of range.
    """
    _check_optimizer(name, betas)
    mask = None if decay_bias else lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    decay = optax.add_decayed_weights(weight_decay, mask=mask)
    adam = optax.scale_by_adam(b1=betas[0], b2=betas[1], eps=eps)
    chosen = {
        ADAMW: (adam, decay),
        ADAM_L2: (decay, adam),
        SGD: (decay, optax.trace(betas[0])),
        KERAS_ADAM: (scale_by_keras_adam(*betas, eps), decay),
    }[name]
    first = () if nan_fill is None else (optax.stateless(lambda grads, _: filled(grads, nan_fill)),)
    first += (optax.stateless(lambda grads, _: clipped(grads, clip_per_tensor)),) if clip_per_tensor else ()
    chosen = optax.chain(*first, *chosen)
    if set(trainable) == set(groups):
        return chosen
    labels = {group: "train" if group in trainable else "frozen" for group in groups}
    return optax.partition({"train": chosen, "frozen": optax.set_to_zero()}, labels)


def filled(grads: optax.Updates, value: float) -> optax.Updates:
    """Gradients with `value` in the place of every NaN entry."""
    return jax.tree.map(lambda g: jnp.where(jnp.isnan(g), jnp.asarray(value, g.dtype), g), grads)


def clipped(grads: optax.Updates, limit: float) -> optax.Updates:
    """`g min(1, limit / |g|)` for every array on its own (More From Less, C6): no clipping by the global norm."""

    def clip(g: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(g.astype(jnp.float32))))
        return g * jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny)).astype(g.dtype)

    return jax.tree.map(clip, grads)


def scale_by_keras_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with eps beside the uncorrected second moment: `sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)` (C6).

    It equals the usual form with eps / sqrt(1 - b2^t), which is larger in the first steps.

    Args:
      b1, b2: decay rates of the moments.
      eps: added to the root.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), m, v)

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        m = jax.tree.map(lambda a, g: b1 * a + (1.0 - b1) * g, state.mu, grads)
        v = jax.tree.map(lambda a, g: b2 * a + (1.0 - b2) * jnp.square(g), state.nu, grads)
        steps = count.astype(jnp.float32)
        rate = jnp.sqrt(1.0 - b2**steps) / (1.0 - b1**steps)
        updates = jax.tree.map(lambda a, b: (rate * a / (jnp.sqrt(b) + eps)).astype(a.dtype), m, v)
        return updates, optax.ScaleByAdamState(count, m, v)

    return optax.GradientTransformation(init, update)


def _check_optimizer(name: str, betas: Sequence[float]) -> None:
    if name not in OPTIMIZERS:
        raise ValueError(f"train.optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"train.betas={tuple(betas)!r}: expected two numbers in [0, 1), e.g. (0.9, 0.999)")
