"""Cross blocks: where the streams of the teacher exchange information, and the student's look-alike (section 5)."""

from __future__ import annotations

import flax.linen as nn
import jax

from histokd_jax.nn.paired.attention import PlaneAttention, expanded_tokens, tokens
from histokd_jax.nn.paired.block import Mlp
from histokd_jax.nn.paired.primitives import BatchNorm, Conv, Separable
from histokd_jax.nn.paired.spec import ATTENTION_OUTPUT, PairedSpec


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

    def ask(self, normed: jax.Array) -> jax.Array:
        """Queries [B, N, 1, C] of a normed grid, one map shared by all expanded keys."""
        return tokens(self.query(normed))[:, :, None]

    def answer(self, queries: jax.Array, normed: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """(update [B, H, W, C], map [B, N, N]) of this stream for given queries."""
        keys = expanded_tokens(self.key(normed), self.spec.attn_expand)
        out, found = self.attention(queries, keys, tokens(self.value(normed)), train, want_map=True)
        return self.proj(out.reshape(normed.shape)), found

    def feed(self, x: jax.Array, train: bool) -> jax.Array:
        """The FFN branch of a grid, its norm included."""
        return self.mlp(self.norm2(x, train), train)


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
        normed_a, normed_b = self.a.norm1(a, train), self.b.norm1(b, train)
        update_a, map_a = self.a.answer(self.b.ask(normed_b), normed_a, train)
        update_b, map_b = self.b.answer(self.a.ask(normed_a), normed_b, train)
        a, b = a + update_a, b + update_b
        return a + self.a.feed(a, train), b + self.b.feed(b, train), map_a, map_b


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
        normed = self.a.norm1(x, train)
        update, found = self.a.answer(self.a.ask(normed), normed, train)
        middle = x + update
        source = middle if self.spec.cross_ffn_source == ATTENTION_OUTPUT else x
        return middle + self.a.feed(source, train), found
