"""The local half of a backbone block: multi-scale depth-wise convolutions (specification, section 4.2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.paired.primitives import BatchNorm, Conv, Depthwise, gelu, operands, per_channel
from histokd_jax.nn.paired.spec import PairedSpec
from histokd_jax.ops.depthwise import depthwise


class MultiScale(nn.Module):
    """Consecutive groups of channels, each with a depth-wise kernel of its own side.

    Attributes:
      features: channels of all groups.
      spec: sides of the kernels.
    """

    features: int
    spec: PairedSpec

    def setup(self) -> None:
        """Declares one layer per group."""
        pairs = zip(self.spec.scale_sizes(self.features), self.spec.local_kernels)
        self.scales = [Depthwise(size, side, self.spec.dtype) for size, side in pairs]

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, features] to the same shape."""
        # Zeros around the smaller kernels make the groups one convolution.
        largest = max(self.spec.local_kernels)
        kernels, biases = zip(*(scale.weights() for scale in self.scales))
        kernel = jnp.concatenate([_enlarged(k, largest) for k in kernels], axis=-1)
        x, kernel, bias = operands(x, kernel, jnp.concatenate(biases), dtype=self.spec.dtype)
        return depthwise(x, kernel, self.spec.depthwise_form) + per_channel(bias, x.ndim)


def _enlarged(kernel: jax.Array, side: int) -> jax.Array:
    margin = (side - kernel.shape[0]) // 2
    return jnp.pad(kernel, [(margin, margin), (margin, margin), (0, 0), (0, 0)])


class LocalUnit(nn.Module):
    """Reduce, multi-scale convolution with identity path, expand.

    Attributes:
      features: c, half the channels of the block.
      spec: the architecture.
    """

    features: int
    spec: PairedSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, c] to the same shape."""
        hidden, spec = self.features // self.spec.local_reduction, self.spec
        # Here the activation comes before the norm.
        h = gelu(Conv(self.features, hidden, use_bias=False, dtype=spec.dtype, name="reduce")(x))
        h = BatchNorm(hidden, spec.norm, name="reduce_norm")(h, train)
        h = h + MultiScale(hidden, spec, name="multi_scale")(h)
        h = BatchNorm(hidden, spec.norm, name="norm")(gelu(h), train)
        h = Conv(hidden, self.features, use_bias=False, dtype=spec.dtype, name="expand")(h)
        return BatchNorm(self.features, spec.norm, name="expand_norm")(h, train)
