"""TransMIL (Shao et al., NeurIPS 2021; baselines specification, section 8) on packed bags of any size.

**Layout.** The network arranges the patches of a slide in a square, so their order matters; it is the order of
`positions`, whatever rows and devices they lie in. Rows of all slides are laid out in tiles (histokd_jax.nn.nystrom)
whose number follows from the patches of the step alone: a bag of n patches has ceil(sqrt(n))^2 + 1 <= n + 2 sqrt(n) + 2
rows, and the square roots of S parts of N patches sum to at most sqrt(S N). No capacity per slide has to be chosen, no
bag is ever cut, and one program serves all sizes.

**Memory.** Everything is kept for the backward pass but the scores, which exist for 16 tiles at a time; nothing is
quadratic in n. Compiled for CPU in float32, a gradient needs 90 KB per patch (2.9 GB for 32,768 patches, tens of arrays
[T, 512] with T = N + 2 sqrt(S N) + S (B + 1) rows, B = `tile`) and 250 MB more per slide (the pseudo-inverses of both
layers: 8 heads, 256 landmarks). On a mesh the projected patches are gathered: every device has all rows.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import TORCH_DEFAULT, Affine, symmetric_uniform
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.layer_norm import LayerNorm
from histokd_jax.nn.nystrom import NystromAttention, Tiles, make_tiles
from histokd_jax.ops.grid_convolution import Grid, grid_convolution

PPEG_SIDES = (7, 5, 3)


def square_side(n: jax.Array) -> jax.Array:
    """ceil(sqrt(n)) of int32 counts, exactly."""
    guess = jnp.sqrt(n.astype(jnp.float32)).astype(jnp.int32)
    # The rounded root is off by one at most.
    return jnp.maximum(guess - 1 + sum(((guess + i) ** 2 < n).astype(jnp.int32) for i in (-1, 0, 1)), 0)


def tile_count(patches: int, slots: int, tile: int) -> int:
    """Tiles that hold the squared sequences of any `slots` bags with `patches` patches in all."""
    rows = patches + 2 * math.sqrt(slots * patches) + 2 * slots
    return int((rows + slots * (tile - 1)) // tile)


def squared_layout(bags: Bags, tile: int) -> tuple[jax.Array, jax.Array, Tiles]:
    """Which patch every row of the squared sequences holds.

    Args:
      bags: the packed patches.
      tile: rows per tile.

    Returns:
      source: [G, B] int32 flat index of the patch; of no meaning in row 0 (class token) and where no row is valid.
      count: [S] int32 patches of each slide.
      tiles: the layout; a sequence is the class token, the n patches, and the first side^2 - n of them again.
    """
    segment_ids, positions = bags.segment_ids.reshape(-1), bags.positions.reshape(-1)
    slots = jnp.arange(1, bags.num_slots + 1, dtype=segment_ids.dtype)
    count = jnp.sum(segment_ids[None, :] == slots[:, None], axis=1, dtype=jnp.int32)
    tiles = make_tiles(square_side(count) ** 2 + 1, tile_count(segment_ids.shape[0], bags.num_slots, tile), tile)
    behind = jnp.where(segment_ids > 0, segment_ids, bags.num_slots + 1)
    order = jnp.lexsort((positions, behind)).astype(jnp.int32)
    patch, size = tiles.row - 1, tiles.per_row(count)
    patch = jnp.where(patch < size, patch, patch - size)
    start = tiles.per_row(jnp.cumsum(count, dtype=jnp.int32) - count)
    return jnp.take(order, start + patch, mode="clip"), count, tiles


def ppeg_grid(count: jax.Array, tiles: Tiles) -> Grid:
    """The squares of the slides; class tokens and rows that are not valid lie outside."""
    side = jnp.maximum(tiles.per_row(square_side(count)), 1)
    y, x = jnp.divmod(jnp.maximum(tiles.row - 1, 0), side)
    inside = tiles.valid & (tiles.row > 0)
    width = jnp.broadcast_to(side, y.shape)
    return Grid(*(t.reshape(-1) for t in (y, x, jnp.where(inside, width, 0), width)))


class PPEG(nn.Module):
    """Pyramid position encoding: x + depthwise convolutions of sides 7, 5 and 3; the class token is not touched.

    Attributes:
      width: row width.
    """

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, grid: Grid) -> jax.Array:
        """[T, width] rows to [T, width]; `grid` is the place of every row."""
        kernel, bias = 0.0, 0.0
        for side in PPEG_SIDES:
            init = symmetric_uniform(1 / side)
            own = self.param(f"kernel{side}", init, (side, side, self.width))
            # One pass: the smaller kernels are the larger one with zeros around.
            margin = (PPEG_SIDES[0] - side) // 2
            kernel = kernel + jnp.pad(own, ((margin, margin), (margin, margin), (0, 0)))
            bias = bias + self.param(f"bias{side}", init, (self.width,))
        inside = (grid.height > 0)[:, None]
        return jnp.where(inside, x + grid_convolution(x, kernel, grid) + bias[None, :], x)


class NystromLayer(nn.Module):
    """`x + attention(LN(x))`.

    Attributes:
      width: row width.
      heads: heads of the attention.
      landmarks: landmarks of the attention.
      rate: dropout of the attention's output.
      layer: number of the dropout layer.
      dtype: compute dtype of the products.
    """

    width: int
    heads: int
    landmarks: int
    rate: float
    layer: int
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        self.norm = LayerNorm(self.width)
        self.attention = NystromAttention(
            self.width, self.heads, self.landmarks, rate=self.rate, layer=self.layer, dtype=self.dtype
        )

    def __call__(self, x: jax.Array, tiles: Tiles, seed: jax.Array | None = None) -> jax.Array:
        """[G, B, width] to [G, B, width]."""
        return x + self.attention(self.norm(x), tiles, seed)


class TransMIL(nn.Module):
    """Class token over squared bags: two Nystrom layers with a convolutional position encoding between them.

    Attributes:
      feat_dim: patch-embedding width D.
      num_outputs: logits C.
      width: row width H.
      heads: attention heads.
      landmarks: landmarks m of the attention.
      rate: dropout of the attention outputs.
      tile: rows per tile.
      dtype: compute dtype of the products.
    """

    feat_dim: int
    num_outputs: int
    width: int = 512
    heads: int = 8
    landmarks: int = 256
    rate: float = 0.1
    tile: int = 256
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        common = (self.width, self.heads, self.landmarks, self.rate)
        self.proj = Affine(self.feat_dim, self.width, TORCH_DEFAULT, self.dtype)
        self.cls_token = self.param("cls_token", nn.initializers.normal(1.0), (self.width,))
        self.layer1 = NystromLayer(*common, layer=0, dtype=self.dtype)
        self.ppeg = PPEG(self.width)
        self.layer2 = NystromLayer(*common, layer=1, dtype=self.dtype)
        self.norm = LayerNorm(self.width)
        self.head = Affine(self.width, self.num_outputs, TORCH_DEFAULT, self.dtype)

    def __call__(self, bags: Bags, genes: None = None, seed: jax.Array | None = None) -> dict[str, jax.Array]:
        """Classifies every slide.

        Args:
          bags: the packed patches.
          genes: not read.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          "embedding" [S, H], the normalised class token (0 for an empty slot), and "logits" [S, C], both float32
          (float64 for float64 parameters).
        """
        del genes
        source, count, tiles = squared_layout(bags, self.tile)
        x = self.layer1(self._sequence(bags, source, tiles), tiles, seed)
        self.sow("intermediates", "after_layer1", x)
        x = self.ppeg(x.reshape(-1, self.width), ppeg_grid(count, tiles)).reshape(x.shape)
        self.sow("intermediates", "after_ppeg", x)
        x = self.layer2(x, tiles, seed).reshape(-1, self.width)
        token = jnp.take(x, tiles.first, axis=0)
        self.sow("intermediates", "layer2_class_token", token)
        embedding = jnp.where(count[:, None] > 0, self.norm(token), 0.0)
        return {"embedding": embedding, "logits": self.head(embedding)}

    def _sequence(self, bags: Bags, source: jax.Array, tiles: Tiles) -> jax.Array:
        """[G, B, H]: class token, projected patches, repeated patches; 0 where no row is valid."""
        bags.check_width(self.feat_dim)
        patches = jnp.where(bags.segment_ids[..., None] > 0, bags.patches, jnp.zeros((), bags.patches.dtype))
        h = jax.nn.relu(self.proj(patches.reshape(-1, self.feat_dim)))
        x = jnp.where((tiles.row == 0)[..., None], self.cls_token[None, None, :], jnp.take(h, source, axis=0))
        return jnp.where(tiles.valid[..., None], x, 0.0)
