"""CoCoFNet, the teacher, and the student of HM-KD (specification, section 6)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.paired.block import Level
from histokd_jax.nn.paired.cross import CrossBlock, SelfBlock
from histokd_jax.nn.paired.primitives import BatchNorm, GroupNorm, Linear
from histokd_jax.nn.paired.spec import LEVELS, PairedSpec

Found = dict[str, jax.Array]
"""logits [B, C], f3 [B, width], feat [B, hidden]; map_a0 .. map_a2 (and map_b*) [B, N, N]; stream_a0 .. stream_a2
[B, H, W, C], the A stream behind each cross block."""


class Head(nn.Module):
    """Group norm, average over the grid, two linear layers.

    Attributes:
      features: channels of the last level.
      spec: the architecture.
    """

    features: int
    spec: PairedSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Found:
        """[B, H, W, features] to f3, feat and logits."""
        spec = self.spec
        f3 = jnp.mean(GroupNorm(self.features, spec.norm.group_eps, name="norm")(x), axis=(1, 2))
        hidden = Linear(self.features, spec.head_hidden, name="hidden")(f3)
        feat = jax.nn.relu(BatchNorm(spec.head_hidden, spec.norm, name="hidden_norm")(hidden, train))
        return {"f3": f3, "feat": feat, "logits": Linear(spec.head_hidden, spec.num_classes, name="logits")(feat)}


def _level(spec: PairedSpec, index: int, depth: int) -> Level:
    inputs, patch = (3, spec.stem_patch) if index == 0 else (spec.widths[index - 1], 2)
    return Level(inputs, spec.widths[index], patch, depth, spec)


class Teacher(nn.Module):
    """Two pyramids that exchange information after each of three levels, and a joint fourth level of their sum.

    Attributes:
      spec: the architecture.
    """

    spec: PairedSpec

    def setup(self) -> None:
        """Declares the levels."""
        spec, depths = self.spec, self.spec.teacher_depths
        self.stream_a = [_level(spec, i, depths[i]) for i in range(LEVELS)]
        self.stream_b = [_level(spec, i, depths[i]) for i in range(LEVELS)]
        self.cross_update = [CrossBlock(spec.widths[i], spec) for i in range(LEVELS)]
        self.fused = _level(spec, LEVELS, depths[LEVELS])
        self.head = Head(spec.widths[LEVELS], spec)

    def __call__(self, a: jax.Array, b: jax.Array, train: bool = False) -> Found:
        """Runs the network.

        Args:
          a: [B, H, W, 3] standardised H&E tiles.
          b: [B, H, W, 3] standardised IHC tiles.
          train: whether batch norms use the statistics of the batch.

        Returns:
          See `Found`.

        Raises:
          ValueError: two sizes, or images that are too small.
        """
        if a.shape != b.shape:
            raise ValueError(f"the stains of a pair must have one shape, got {a.shape} and {b.shape}")
        self.spec.check_size(*a.shape[1:3])
        found = {}
        for i in range(LEVELS):
            a, b = self.stream_a[i](a, train), self.stream_b[i](b, train)
            a, b, found[f"map_a{i}"], found[f"map_b{i}"] = self.cross_update[i](a, b, train)
            found[f"stream_a{i}"] = a
        return found | self.head(self.fused(a + b, train), train)


class Student(nn.Module):
    """The H&E pyramid alone, with maps of the same shapes as those of the teacher.

    Attributes:
      spec: the architecture.
    """

    spec: PairedSpec

    def setup(self) -> None:
        """Declares the levels."""
        spec, depths = self.spec, self.spec.student_depths
        self.stream_a = [_level(spec, i, depths[i]) for i in range(LEVELS)]
        self.cross_update = [SelfBlock(spec.widths[i], spec) for i in range(LEVELS)]
        self.joint = _level(spec, LEVELS, depths[LEVELS])
        self.head = Head(spec.widths[LEVELS], spec)

    def __call__(self, x: jax.Array, train: bool = False) -> Found:
        """Runs the network.

        Args:
          x: [B, H, W, 3] standardised H&E tiles.
          train: whether batch norms use the statistics of the batch.

        Returns:
          See `Found`.

        Raises:
          ValueError: images that are too small.
        """
        self.spec.check_size(*x.shape[1:3])
        found = {}
        for i in range(LEVELS):
            x, found[f"map_a{i}"] = self.cross_update[i](self.stream_a[i](x, train), train)
            found[f"stream_a{i}"] = x
        return found | self.head(self.joint(x, train), train)
