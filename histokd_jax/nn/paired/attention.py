"""Gated token attention as a layer: filters and norm of the attention plane (specification, section 4.3)."""

from __future__ import annotations

import flax.linen as nn
import jax

from histokd_jax.nn.paired.primitives import CONV_STD, BatchNorm, Separable, normal, separable_together
from histokd_jax.nn.paired.spec import PairedSpec
from histokd_jax.ops import token_attention as ops


class PlaneAttention(nn.Module):
    """Scores, filter, norm, gate, filter, and the gathering of values.

    Attributes:
      spec: the architecture.
    """

    spec: PairedSpec

    def setup(self) -> None:
        """Declares filters and norm."""
        maps = self.spec.attn_expand
        self.mix = self.param("mix", normal(CONV_STD), (3, 3, maps, maps))
        self.norm = BatchNorm(maps, self.spec.norm)
        self.collapse = self.param("collapse", normal(CONV_STD), (3, 3, maps, 1))

    def __call__(
        self, queries: jax.Array, keys: jax.Array, values: jax.Array, train: bool, want_map: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Gathers values by the attention map.

        Args:
          queries: [B, N, E, c], or [B, N, 1, c] shared by all maps.
          keys: [B, N, E, c].
          values: [B, N, c].
          train: see `BatchNorm`.
          want_map: whether the map is needed.

        Returns:
          (gathered [B, N, c], map [B, N, N] or None; rows are queries, columns keys).
        """
        batch, tokens, maps = keys.shape[:3]
        rows = ops.block_rows(batch, tokens, maps, self.spec.plane_elements)
        if rows == tokens:
            mixed = ops.mixed_scores(queries, keys, self.mix)
            plane = self._plane(train, lambda: ops.moments(mixed), batch * tokens**2)
            return ops.attend(mixed, values, plane, self.spec.gate)
        plane = self._plane(train, lambda: ops.plane_moments(queries, keys, self.mix), batch * tokens**2)
        return ops.attend_in_blocks(queries, keys, values, plane, rows, self.spec.gate, want_map)

    def _plane(self, train: bool, moments, count: int) -> ops.Plane:
        if train:
            mean, var = moments()
            self.norm.record(mean, var, count)
        else:
            mean, var = self.norm.running()
        return ops.Plane(self.mix, *self.norm.factors(mean, var), self.collapse)


def tokens(x: jax.Array) -> jax.Array:
    """[B, H, W, c] to [B, N, c], raster order."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def expanded_tokens(x: jax.Array, maps: int) -> jax.Array:
    """[B, H, W, E c] to [B, N, E, c]; the map is the outer index of the channels."""
    return x.reshape(x.shape[0], -1, maps, x.shape[-1] // maps)


class GlobalUnit(nn.Module):
    """The global half of a backbone block: self-attention; no projection behind it.

    Attributes:
      features: c, half the channels of the block.
      spec: the architecture.
    """

    features: int
    spec: PairedSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, c] to the same shape."""
        maps, options = self.spec.attn_expand, (self.spec.dtype, self.spec.depthwise_form)
        widths = {"query": maps * self.features, "key": maps * self.features, "value": self.features}
        layers = [Separable(self.features, width, *options, name=name) for name, width in widths.items()]
        queries, keys, values = separable_together(layers, x)
        attention = PlaneAttention(self.spec, name="attention")
        queries, keys = expanded_tokens(queries, maps), expanded_tokens(keys, maps)
        out, _ = attention(queries, keys, tokens(values), train, want_map=False)
        return out.reshape(x.shape)
