"""Fusion of two modality vectors: gated bilinear (Kronecker) and concatenation (MKD specification 4.4)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine, operand, symmetric_uniform
from histokd_jax.ops.dropout import slot_dropout

BILINEAR = "bilinear"
CONCAT = "concat"
FUSIONS = (BILINEAR, CONCAT)

DROPOUT_LAYERS = 5
"""Dropout layers of one `BilinearFusion`, for numbering."""


class Bilinear(nn.Module):
    """`y_c = v1^T W_c v2 + b_c`.

    Kernel and bias are Uniform(+-1/sqrt(width)) whatever the initialiser of the linear layers is.

    Attributes:
      width: width of both arguments.
      features: output width.
      dtype: compute dtype of the products.
    """

    width: int
    features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """[S, width] x [S, width] to [S, features] float32 (float64 for float64 parameters)."""
        init = symmetric_uniform(1.0 / math.sqrt(self.width))
        kernel = self.param("kernel", init, (self.features, self.width, self.width))
        bias = self.param("bias", init, (self.features,))
        total = jnp.promote_types(kernel.dtype, jnp.float32)
        # Two steps: one einsum might materialise the outer product [S, width, width].
        half = jnp.einsum(
            "si,kij->skj", operand(first, self.dtype), operand(kernel, self.dtype), preferred_element_type=total
        )
        return jnp.einsum("skj,sj->sk", half, second.astype(total)) + bias[None, :]


class BilinearFusion(nn.Module):
    """Gated Kronecker fusion with skip connections.

    Attributes:
      width: width of both arguments and of the result.
      inner: width of each factor of the outer product.
      rate: dropout of the five layers.
      layer: number of the first dropout layer; `DROPOUT_LAYERS` are used.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    width: int
    inner: int = 32
    rate: float = 0.0
    layer: int = 0
    initializer: str = TORCH_DEFAULT
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""

        def dense(fan_in: int, out: int) -> Affine:
            return Affine(fan_in, out, self.initializer, self.dtype)

        self.h1, self.h2 = dense(self.width, self.inner), dense(self.width, self.inner)
        self.z1, self.z2 = (Bilinear(self.width, self.inner, self.dtype) for _ in range(2))
        self.o1, self.o2 = dense(self.inner, self.inner), dense(self.inner, self.inner)
        self.encode = dense((self.inner + 1) ** 2, self.width)
        self.merge = dense(3 * self.width, self.width)

    def __call__(self, first: jax.Array, second: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Fuses two vectors per slide; the order of the arguments matters.

        Args:
          first: [S, width] float.
          second: [S, width] float.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, width] float32 (float64 for float64 parameters), non-negative.
        """

        def drop(v: jax.Array, offset: int) -> jax.Array:
            return v if seed is None else slot_dropout(v, seed, self.rate, self.layer + offset)

        o1 = drop(self._factor(self.h1, self.z1, self.o1, first, first, second), 0)
        o2 = drop(self._factor(self.h2, self.z2, self.o2, second, first, second), 1)
        outer = _with_one(o1)[:, :, None] * _with_one(o2)[:, None, :]
        flat = drop(outer.reshape(outer.shape[0], -1), 2)
        encoded = drop(jax.nn.relu(self.encode(flat)), 3)
        return drop(jax.nn.relu(self.merge(jnp.concatenate([encoded, first, second], axis=-1))), 4)

    @staticmethod
    def _factor(h: Affine, z: Bilinear, o: Affine, own: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        return jax.nn.relu(o(jax.nn.sigmoid(z(first, second)) * jax.nn.relu(h(own))))


def _with_one(v: jax.Array) -> jax.Array:
    return jnp.concatenate([v, jnp.ones((v.shape[0], 1), v.dtype)], axis=-1)


class ConcatFusion(nn.Module):
    """`ReLU(FC(ReLU(FC([v1; v2]))))`, without dropout.

    Attributes:
      width: width of both arguments and of the result.
      initializer: see `Affine`.
      dtype: compute dtype of the products.
    """

    width: int
    initializer: str = TORCH_DEFAULT
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.encode = Affine(2 * self.width, 2 * self.width, self.initializer, self.dtype)
        self.merge = Affine(2 * self.width, self.width, self.initializer, self.dtype)

    def __call__(self, first: jax.Array, second: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """[S, width] x [S, width] to [S, width], non-negative; `seed` is not used."""
        del seed
        return jax.nn.relu(self.merge(jax.nn.relu(self.encode(jnp.concatenate([first, second], axis=-1)))))
