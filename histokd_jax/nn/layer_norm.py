"""Layer normalisation on rows and on feature-major columns, with the parameters at hand."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

EPS = 1e-5

NormParams = Mapping[str, jax.Array]
"""{"scale": [H], "bias": [H]}."""


def layer_norm(params: NormParams, x: jax.Array, axis: int = -1) -> jax.Array:
    """`(x - mean) / sqrt(variance + 1e-5) * scale + bias` with the population variance along one axis.

    Args:
      params: scale [H], bias [H].
      x: float with H entries along `axis`.
      axis: the features: -1 for rows [..., H], 0 for columns [H, n].

    Returns:
      Array of the shape of `x`, at least float32.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = x - jnp.mean(x, axis=axis, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=axis, keepdims=True) + EPS)
    shape = [1] * x.ndim
    shape[axis] = -1
    return normal * params["scale"].reshape(shape) + params["bias"].reshape(shape)


class LayerNorm(nn.Module):
    """`layer_norm` with its parameters, which start at scale 1 and shift 0.

    Attributes:
      width: H.
    """

    width: int

    def setup(self) -> None:
        """Declares the parameters."""
        self.scale = self.param("scale", nn.initializers.ones, (self.width,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.width,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] to [..., width]."""
        return layer_norm(self.weights(), x)

    def weights(self) -> NormParams:
        """The parameters as stored."""
        return {"scale": self.scale, "bias": self.bias}
