"""Self-normalising blocks with own weights for every gene group (baselines specification, sections 9 and 11).

Groups are consecutive blocks of the gene vector with sizes from one to hundreds. One small product per group would
leave a machine idle, and padding all groups to the largest wastes most of it (331 pathways of 1 to 199 genes: 6.8 times
the work). So groups are cut into blocks of a few genes: one batched product over all blocks, then sums of the blocks of
each group. Parameters are stored without padding, and the products stay in their dtype: they are bound by reading the
weights once, and not every backend has batched products of bfloat16.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.nn.affine import Initializer
from histokd_jax.ops.dropout import slot_alpha_dropout

GENE_BLOCK = 16
DROPOUT_LAYERS = 2
"""Dropout layers of one `GroupedSelfNormalising`, for numbering."""


def gene_blocks(sizes: tuple[int, ...], block: int = GENE_BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Cuts groups into blocks.

    Args:
      sizes: genes of each of the P groups.
      block: genes per block.

    Returns:
      index: [N, block] int32 place in the gene vector, the number of genes K where a block is not full.
      owner: [N] int32 group of each block, ascending.
    """
    total, index, owner, start = sum(sizes), [], [], 0
    for group, size in enumerate(sizes):
        for first in range(start, start + size, block):
            places = np.arange(first, first + block, dtype=np.int32)
            index.append(np.where(places < start + size, places, total))
            owner.append(group)
        start += size
    return np.stack(index), np.array(owner, np.int32)


def check_groups(sizes: tuple[int, ...], num_genes: int) -> None:
    """Refuses group sizes that do not describe the genes.

    Raises:
      ValueError: naming the sizes.
    """
    if not sizes or min(sizes) < 1 or sum(sizes) != num_genes:
        raise ValueError(
            f"gene groups of sizes {sizes[:8]}{'...' if len(sizes) > 8 else ''} (sum {sum(sizes)}) do not describe "
            f"{num_genes} genes: every group needs at least one gene, and the sizes must add up"
        )


class GroupedSelfNormalising(nn.Module):
    """(Linear layer, ELU, alpha dropout) twice for every group, each with its own weights.

    Kernels and biases start Uniform(+-1/sqrt(fan_in)).

    Attributes:
      sizes: genes of each of the P groups.
      width: output width H.
      rate: alpha dropout of both blocks.
      layer: number of the first dropout layer; `DROPOUT_LAYERS` are used.
    """

    sizes: tuple[int, ...]
    width: int = 256
    rate: float = 0.25
    layer: int = 0

    def setup(self) -> None:
        """Declares the layers."""
        groups, width = len(self.sizes), self.width
        first, second = _uniform_by_fan_in(self.sizes, self.sizes), _uniform_by_fan_in(self.sizes, (1,) * groups)
        self.kernel1 = self.param("kernel1", first, (sum(self.sizes), width))
        self.bias1 = self.param("bias1", second, (groups, width))
        inner = _uniform(1 / math.sqrt(width))
        self.kernel2 = self.param("kernel2", inner, (groups, width, width))
        self.bias2 = self.param("bias2", inner, (groups, width))

    def __call__(self, genes: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """Embeds every group.

        Args:
          genes: [S, K] float, groups side by side.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          [S, P, H] float32 (float64 for float64 parameters).

        Raises:
          ValueError: for genes of another number.
        """
        check_groups(self.sizes, genes.shape[-1])
        h = jax.nn.elu(self._first(genes) + self.bias1[None])
        h = self._drop(h, seed, 0)
        h = jax.nn.elu(jnp.einsum("sph,phk->spk", h, self.kernel2) + self.bias2[None])
        return self._drop(h, seed, 1)

    def _first(self, genes: jax.Array) -> jax.Array:
        index, owner = gene_blocks(self.sizes)
        parts = jnp.take(genes, index, axis=1, mode="fill", fill_value=0)
        kernel = jnp.take(self.kernel1, index, axis=0, mode="fill", fill_value=0)
        blocks = jnp.einsum("snb,nbh->nsh", parts, kernel)
        return jnp.swapaxes(jax.ops.segment_sum(blocks, owner, len(self.sizes), indices_are_sorted=True), 0, 1)

    def _drop(self, h: jax.Array, seed: jax.Array | None, offset: int) -> jax.Array:
        return h if seed is None else slot_alpha_dropout(h, seed, self.rate, self.layer + offset)


def _uniform(bound: float | np.ndarray) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * jnp.asarray(bound, dtype)

    return init


def _uniform_by_fan_in(sizes: tuple[int, ...], repeats: tuple[int, ...]) -> Initializer:
    """Uniform(+-1/sqrt(size)) for rows of which each group has some."""
    return _uniform(np.repeat(np.asarray(sizes, np.float64) ** -0.5, repeats)[:, None])
