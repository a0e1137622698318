"""Transformer encoder with the norm behind each residual sum, on a fixed number of tokens per slide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import AffineParams, affine, symmetric_uniform
from histokd_jax.nn.layer_norm import NormParams, layer_norm
from histokd_jax.ops.dropout import slot_dropout

LayerParams = Mapping[str, AffineParams | NormParams]
"""Affine layers "qkv" [H, 3 H], "out" [H, H], "fc1" [H, F], "fc2" [F, H]; norms "norm1", "norm2"."""

LAYER_DROPOUTS = 4
"""Dropout layers of one encoder layer, for numbering."""


def affine_init(fan_in: int, out: int, kernel_bound: float, bias_bound: float) -> Callable[[jax.Array], AffineParams]:
    """Initialiser of kernel [fan_in, out] and bias [out], each Uniform(+-bound)."""

    def init(key: jax.Array) -> AffineParams:
        kernel, bias = jax.random.split(key)
        return {
            "kernel": symmetric_uniform(kernel_bound)(kernel, (fan_in, out)),
            "bias": symmetric_uniform(bias_bound)(bias, (out,)) if bias_bound else jnp.zeros((out,)),
        }

    return init


def packed_projection_init(width: int) -> Callable[[jax.Array], AffineParams]:
    """Queries, keys and values in one layer [H, 3 H]: Xavier-uniform as one matrix, bias 0 (section 9)."""
    return affine_init(width, 3 * width, math.sqrt(6 / (4 * width)), 0.0)


def attention_output_init(width: int) -> Callable[[jax.Array], AffineParams]:
    """Layer behind an attention: uniform kernel, bias 0 (section 9)."""
    return affine_init(width, width, 1 / math.sqrt(width), 0.0)


def layer_init(key: jax.Array, width: int, hidden: int) -> LayerParams:
    """Initial parameters of one encoder layer."""
    keys = jax.random.split(key, 4)
    norm = {"scale": jnp.ones((width,)), "bias": jnp.zeros((width,))}
    return {
        "qkv": packed_projection_init(width)(keys[0]),
        "out": attention_output_init(width)(keys[1]),
        "fc1": affine_init(width, hidden, width**-0.5, width**-0.5)(keys[2]),
        "fc2": affine_init(hidden, width, hidden**-0.5, hidden**-0.5)(keys[3]),
        "norm1": norm,
        "norm2": dict(norm),
    }


Drop = Callable[[jax.Array, int], jax.Array]
"""(slot-major array, number of the dropout layer within the encoder layer) -> the array with some elements dropped."""


def self_attention(params: LayerParams, x: jax.Array, heads: int, drop: Drop, dtype: jnp.dtype | None) -> jax.Array:
    """Multi-head attention among the tokens of each slide.

    Args:
      params: "qkv" and "out".
      x: [S, T, H] float.
      heads: number of heads; contiguous parts of H.
      drop: applied to the attention weights.
      dtype: compute dtype of the projections; the few products among tokens stay in at least float32.

    Returns:
      [S, T, H].
    """
    packed = affine(params["qkv"], x, dtype).reshape(*x.shape[:2], 3, heads, -1)
    q, k, v = (packed[:, :, i] for i in range(3))
    scores = jnp.einsum("sqhd,skhd->shqk", q, k) / math.sqrt(q.shape[-1])
    weights = drop(jax.nn.softmax(scores, axis=-1), 0)
    mixed = jnp.einsum("shqk,skhd->sqhd", weights, v)
    return affine(params["out"], mixed.reshape(x.shape), dtype)


def encoder_layer(params: LayerParams, x: jax.Array, heads: int, drop: Drop, dtype: jnp.dtype | None) -> jax.Array:
    """`x = LN(x + Drop(MHA(x)))`, then `x = LN(x + Drop(FC(Drop(ReLU(FC(x))))))`; arguments as `self_attention`."""
    x = layer_norm(params["norm1"], x + drop(self_attention(params, x, heads, drop, dtype), 1))
    h = drop(jax.nn.relu(affine(params["fc1"], x, dtype)), 2)
    return layer_norm(params["norm2"], x + drop(affine(params["fc2"], h, dtype), 3))


class PostNormEncoder(nn.Module):
    """Layers of `encoder_layer`; as copies of one another they **start with equal values**.

    Attributes:
      width: token width H.
      hidden: width F of the feed-forward.
      heads: attention heads.
      depth: number of layers.
      rate: every dropout.
      layer: number of the first dropout layer; `LAYER_DROPOUTS` x depth are used.
      dtype: compute dtype of the products.
    """

    width: int
    hidden: int = 512
    heads: int = 8
    depth: int = 2
    rate: float = 0.25
    layer: int = 0
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        first = self.param("layers_0", layer_init, self.width, self.hidden)
        # Copies are arrays of their own: a training step that reuses the memory of its arguments needs them apart.
        copies = [self.param(f"layers_{i}", lambda _: jax.tree.map(jnp.copy, first)) for i in range(1, self.depth)]
        self.stack = (first, *copies)

    def __call__(self, x: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Encodes tokens.

        Args:
          x: [S, T, H] float.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, T, H] float32 (float64 for float64 parameters).
        """
        for i, params in enumerate(self.stack):

            def drop(v: jax.Array, offset: int, first: int = self.layer + i * LAYER_DROPOUTS) -> jax.Array:
                return v if seed is None else slot_dropout(v, seed, self.rate, first + offset)

            x = encoder_layer(params, x, self.heads, drop, self.dtype)
            self.sow("intermediates", f"after_layer{i}", x)
        return x
