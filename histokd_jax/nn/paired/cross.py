"""Cross blocks: where the streams of the teacher exchange information, and the student's look-alike (section 5)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax

from histokd_jax.nn.paired.attention import PlaneAttention, expanded_tokens, tokens
from histokd_jax.nn.paired.block import Mlp
from histokd_jax.nn.paired.primitives import BatchNorm, Conv, Separable, separable_together
from histokd_jax.nn.paired.spec import ATTENTION_OUTPUT, PairedSpec


class Projected(NamedTuple):
    """Queries [B, N, 1, C], keys [B, N, E, C] and values [B, N, C] of one stream."""

    queries: jax.Array
    keys: jax.Array
    values: jax.Array


class Side(nn.Module):
    """The parameters of one stream in a cross block.

    Attributes:
      features: C.
      spec: the architecture.
    """

    features: int
    spec: PairedSpec

    def setup(self) -> None:
        """Declares the layers."""
        width, spec = self.features, self.spec
        options = (spec.dtype, spec.depthwise_form)
        self.norm1 = BatchNorm(width, spec.norm)
        # The query of a stream is read by the *other* stream's attention (in the student, by its own).
        self.query = Separable(width, width, *options)
        self.key = Separable(width, spec.attn_expand * width, *options)
        self.value = Separable(width, width, *options)
        self.attention = PlaneAttention(spec)
        self.proj = Conv(width, width, 3, use_bias=False, dtype=spec.dtype)
        self.norm2 = BatchNorm(width, spec.norm)
        self.mlp = Mlp(width, spec, norms=True)

    def project(self, x: jax.Array, train: bool) -> Projected:
        """Queries, keys and values of a grid, its norm included; one query map is shared by all expanded keys."""
        normed = self.norm1(x, train)
        queries, keys, values = separable_together((self.query, self.key, self.value), normed)
        return Projected(tokens(queries)[:, :, None], expanded_tokens(keys, self.spec.attn_expand), tokens(values))

    def answer(self, queries: jax.Array, own: Projected, shape: tuple, train: bool) -> tuple[jax.Array, jax.Array]:
        """(update of `shape` [B, H, W, C], map [B, N, N]) of this stream for given queries."""
        out, found = self.attention(queries, own.keys, own.values, train, want_map=True)
        return self.proj(out.reshape(shape)), found

    def feed(self, x: jax.Array, train: bool) -> jax.Array:
        """The FFN branch of a grid, its norm included."""
        return self.mlp(self.norm2(x, train), train)

    def respond(self, x: jax.Array, queries: jax.Array, own: Projected, train: bool) -> tuple[jax.Array, jax.Array]:
        """(x [B, H, W, C] behind attention and FFN, map [B, N, N]) for the queries of the other stream."""
        update, found = self.answer(queries, own, x.shape, train)
        x = x + update
        return x + self.feed(x, train), found


class CrossBlock(nn.Module):
    """The teacher's: map A_s scores positions of the other stream (rows) against those of stream s (columns).

    Attributes:
      features: C.
      spec: the architecture.
    """

    features: int
    spec: PairedSpec

    def setup(self) -> None:
        """Declares both sides."""
        self.a = Side(self.features, self.spec)
        self.b = Side(self.features, self.spec)

    def __call__(self, a: jax.Array, b: jax.Array, train: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(a, b [B, H, W, C]) to (a, b, A_a [B, N, N], A_b)."""
        own_a, own_b = self.a.project(a, train), self.b.project(b, train)
        a, map_a = self.a.respond(a, own_b.queries, own_a, train)
        b, map_b = self.b.respond(b, own_a.queries, own_b, train)
        return a, b, map_a, map_b


class SelfBlock(nn.Module):
    """The student's: the same parts of one stream, which asks itself.

    Attributes:
      features: C.
      spec: the architecture; `cross_ffn_source` decides what the FFN branch reads.
    """

    features: int
    spec: PairedSpec

    def setup(self) -> None:
        """Declares the side."""
        self.a = Side(self.features, self.spec)

    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """x [B, H, W, C] to (x, A_a [B, N, N])."""
        own = self.a.project(x, train)
        update, found = self.a.answer(own.queries, own, x.shape, train)
        middle = x + update
        source = middle if self.spec.cross_ffn_source == ATTENTION_OUTPUT else x
        return middle + self.a.feed(source, train), found
