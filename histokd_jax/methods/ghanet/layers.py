"""Layers of G-HANet on a few tokens per slide (specification 4.1); patches are in `patches`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.ops.dropout import slot_dropout

NormParams = Mapping[str, jax.Array]
"""{"scale": [H], "bias": [H]}."""

_EPS = 1e-5


def normalise(params: NormParams, x: jax.Array, axis: int) -> jax.Array:
    """Layer normalisation along one axis of at least float32 activations, with the two-pass variance.

    Args:
      params: scale and shift.
      x: float; the width lies along `axis`.
      axis: 0 for feature-major [H, n], -1 for [..., H].

    Returns:
      Array like `x`.
    """
    shape = [1] * x.ndim
    shape[axis] = -1
    centred = x - jnp.mean(x, axis=axis, keepdims=True)
    variance = jnp.mean(centred * centred, axis=axis, keepdims=True)
    return centred * jax.lax.rsqrt(variance + _EPS) * params["scale"].reshape(shape) + params["bias"].reshape(shape)


def maybe_drop(v: jax.Array, seed: jax.Array | None, rate: float, layer: int) -> jax.Array:
    """Dropout of slot-level activations if there is a seed."""
    return v if seed is None else slot_dropout(v, seed, rate, layer)


class Norm(nn.Module):
    """Layer normalisation with scale and shift, eps 1e-5.

    Attributes:
      width: H.
    """

    width: int

    def setup(self) -> None:
        """Declares the parameters."""
        self.scale = self.param("scale", nn.initializers.ones, (self.width,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.width,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., H] to [..., H]."""
        return normalise(self.weights(), x, -1)

    def weights(self) -> NormParams:
        """The parameters, for chunk functions."""
        return {"scale": self.scale, "bias": self.bias}


class FeedForward(nn.Module):
    """GFF: `Lin(a * gelu(b))` with [a, b] = Lin(x), exact GELU, then dropout; no norm of its own.

    Attributes:
      width: H.
      mult: inner width in units of H.
      rate: dropout of the output.
      layer: number of the dropout layer.
      dtype: compute dtype of the products.
    """

    width: int
    mult: int = 4
    rate: float = 0.0
    layer: int = 0
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        inner = self.mult * self.width
        self.expand = Affine(self.width, 2 * inner, TORCH_DEFAULT, self.dtype)
        self.contract = Affine(inner, self.width, TORCH_DEFAULT, self.dtype)

    def __call__(self, x: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """[S, T, H] to [S, T, H]."""
        a, b = jnp.split(self.expand(x), 2, axis=-1)
        return maybe_drop(self.contract(a * jax.nn.gelu(b, approximate=False)), seed, self.rate, self.layer)


class Attention(nn.Module):
    """Attn(q, c) of the specification: heads in contiguous blocks, biases on the output layer only.

    On patches, the key and value layers move out of the loop: with context C, query u and blocks W_k, W_v of a head,
    `u . (C W_k) = (u W_k') . C` and `sum_n p_n (C_n W_v) = (sum_n p_n C_n) W_v`, exactly, and also for weights that do
    not sum to 1 (dropout), because neither layer has a bias. A patch then costs heads x T products of width H for each
    of score and sum, in place of two full layers.

    Attributes:
      width: H of queries, context and output.
      heads: number of heads.
      head_dim: width of a head.
      rate: dropout of the probabilities (tokens only; on patches the chunk function draws it).
      layer: number of the dropout layer.
      dtype: compute dtype of the products.
    """

    width: int
    heads: int
    head_dim: int
    rate: float = 0.0
    layer: int = 0
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        inner = self.heads * self.head_dim
        self.q, self.k, self.v = (
            Affine(self.width, inner, TORCH_DEFAULT, self.dtype, use_bias=False) for _ in range(3)
        )
        self.out = Affine(inner, self.width, TORCH_DEFAULT, self.dtype)

    def __call__(self, tokens: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Attention of the tokens of a slide to one another, [S, T, H] to [S, T, H]."""
        q, k, v = (self._split(layer(tokens)) for layer in (self.q, self.k, self.v))
        scores = jnp.einsum("sqhd,sthd->shqt", q, k) / math.sqrt(self.head_dim)
        p = maybe_drop(jax.nn.softmax(scores, axis=-1), seed, self.rate, self.layer)
        mixed = jnp.einsum("shqt,sthd->sqhd", p, v)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))

    def moved_queries(self, tokens: jax.Array) -> jax.Array:
        """Queries in the space of the context, scaled.

        Args:
          tokens: [S, T, H].

        Returns:
          [S, heads * T, H]; row h * T + t belongs to head h and token t.
        """
        q, kernel = self._split(self.q(tokens)), self._blocks(self.k)
        # In full precision: tokens are few, and CPUs have no batched bfloat16 product with a float32 result.
        moved = jnp.einsum("sqhd,ihd->shqi", q, kernel)
        return moved.reshape(tokens.shape[0], -1, self.width) / math.sqrt(self.head_dim)

    def finish(self, pooled: jax.Array) -> jax.Array:
        """From weighted sums of the context [S, heads * T, H] to the output [S, T, H]."""
        pooled = pooled.reshape(pooled.shape[0], self.heads, -1, self.width)
        kernel = self._blocks(self.v)
        mixed = jnp.einsum("shqi,ihd->sqhd", pooled, kernel)
        return self.out(mixed.reshape(*mixed.shape[:2], -1))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim)

    def _blocks(self, layer: Affine) -> jax.Array:
        return self._split(layer.weights()["kernel"])
