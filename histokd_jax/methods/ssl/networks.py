"""Encoders and projectors, and one pass of a branch through one of them (specification, A2 and B3).

Every branch is a pass of its own: batch norms see that branch alone, and a shared network updates its running averages
once per branch, in the order of the branches.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.encoders import build
from histokd_jax.nn.encoders.specs import ResNetSpec, Spec

STATS = "batch_stats"


class DenseNetwork(nn.Module):
    """Dense layers with batch norm and ReLU behind all but the last: a projector, or the encoder of a vector.

    Attributes:
      widths: outputs of every layer.
      bn_eps: of the batch norms; Keras' default.
      bn_momentum: running = momentum * running + (1 - momentum) * batch.
      last_bias: whether the last layer has a bias; the original VICReg's has none (section C2).
      dtype: of the products; None for float32. Batch norms and the result are float32.
    """

    widths: tuple[int, ...]
    bn_eps: float = 1e-3
    bn_momentum: float = 0.99
    last_bias: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, inputs] to [B, widths[-1]] float32; in training batch norms use the batch and update "batch_stats"."""
        glorot, last = nn.initializers.glorot_uniform(), len(self.widths) - 1
        for i, width in enumerate(self.widths):
            bias = i < last or self.last_bias
            x = nn.Dense(width, bias, dtype=self.dtype, kernel_init=glorot, name=f"dense_{i}")(x)
            if i < last:
                norm = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=self.bn_momentum,
                    epsilon=self.bn_eps,
                    dtype=jnp.float32,
                    use_fast_variance=False,
                    name=f"norm_{i}",
                )
                x = nn.relu(norm(x))
        return x.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
      module: maps [B, ...] to [B, features].
      sample: shape of one input, without the batch.
      features: width of its output.
      has_train: whether the module knows training mode; vision transformers have no batch norm and do not.
    """

    module: nn.Module
    sample: tuple[int, ...]
    features: int
    has_train: bool = True

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        """Random variables: "params", and "batch_stats" if there are batch norms."""
        return self.module.init(key, jnp.zeros((1, *self.sample)))


def image_network(spec: Spec, size: tuple[int, int], dtype: jnp.dtype | None) -> Network:
    """The network of an image encoder.

    Args:
      spec: architecture.
      size: (height, width) of the images.
      dtype: of products and convolutions; None for float32.
    """
    convolutional = isinstance(spec, ResNetSpec)
    # Values at the start do not depend on the size; a small one keeps a convolutional network cheap.
    sample = (32, 32, 3) if convolutional else (*size, 3)
    return Network(build.build(spec, dtype), sample, spec.features, has_train=convolutional)


def dense_network(inputs: int, widths: Sequence[int], **options: Any) -> Network:
    """A `DenseNetwork` on vectors of `inputs` numbers."""
    return Network(DenseNetwork(tuple(widths), **options), (inputs,), widths[-1])


def apply(
    network: Network,
    params: Any,
    stats: Any,
    x: jax.Array,
    *,
    train: bool,
    where: jax.Array | None = None,
    shards: int = 1,
) -> tuple[jax.Array, Any]:
    """One pass of one branch.

    Args:
      network: what to apply.
      params: its parameters.
      stats: its running averages; empty if it has none.
      x: [B, ...].
      train: normalise by the batch and update the averages.
      where: [B] bool, the rows that batch norms see; None: all. Without any, all are seen and the averages stay.
      shards: consecutive parts of the batch with batch statistics of their own; new averages are the mean of theirs.

    Returns:
      ([B, features] float32, new averages).

    Raises:
      ValueError: the parts do not divide the batch.
    """
    if not (train and network.has_train and stats):
        variables = {"params": params, **({STATS: stats} if stats else {})}
        return network.module.apply(variables, x), stats
    if shards == 1:
        return _train(network, params, stats, x, where)
    if len(x) % shards:
        raise ValueError(f"bn.scope=per_device: {len(x)} examples cannot be divided over {shards} devices")
    cut = lambda a: a.reshape(shards, -1, *a.shape[1:])  # noqa: E731
    one = lambda x, where: _train(network, params, stats, x, where)  # noqa: E731
    if where is None:
        found, new = jax.vmap(lambda x: one(x, None))(cut(x))
    else:
        found, new = jax.vmap(one)(cut(x), cut(where))
    return found.reshape(-1, found.shape[-1]), jax.tree.map(lambda a: jnp.mean(a, axis=0), new)


def _train(network: Network, params: Any, stats: Any, x: jax.Array, where: jax.Array | None) -> tuple[jax.Array, Any]:
    some = None if where is None else jnp.any(where)
    seen = contextlib.nullcontext() if where is None else nn.intercept_methods(_masking(where | ~some))
    with seen:
        found, new = network.module.apply({"params": params, STATS: stats}, x, True, mutable=[STATS])
    new = new[STATS]
    return found, new if some is None else jax.tree.map(lambda a, b: jnp.where(some, a, b), new, stats)


def _masking(where: jax.Array) -> Callable[..., Any]:
    """Hands a mask of rows to every batch norm inside, so that absent views do not enter the statistics."""

    def intercept(run, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            kwargs = {**kwargs, "mask": where.reshape(-1, *(1,) * (args[0].ndim - 1))}
        return run(*args, **kwargs)

    return intercept
