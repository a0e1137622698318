"""CoCoFNet, the teacher, and the student of HM-KD (specification, section 6)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.paired import folded
from histokd_jax.nn.paired.block import Level
from histokd_jax.nn.paired.cross import CrossBlock, SelfBlock, Side
from histokd_jax.nn.paired.folded import STATISTICS
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


def make_level(spec: PairedSpec, index: int, depth: int, **place: Any) -> Level:
    """A level of a network; `place` as for `Level.patch_embed`."""
    inputs, patch = (spec.stem_inputs, spec.stem_patch) if index == 0 else (spec.widths[index - 1], 2)
    return Level(inputs, spec.widths[index], patch, depth, spec, **place)


class _Network(nn.Module):
    """What both networks share: parts are written out to initialise them, and else folded if the spec says so.

    Attributes:
      spec: the architecture.
    """

    spec: PairedSpec

    @nn.nowrap
    def _is_folded(self) -> bool:
        return self.spec.folded and not self.is_initializing()

    @nn.nowrap
    def _record(self, statistics: dict[str, Any]) -> None:
        """Keeps the running statistics of folded parts."""
        if self.is_mutable_collection(STATISTICS):
            for name, tree in statistics.items():
                self.put_variable(STATISTICS, name, tree)


class Teacher(_Network):
    """Two pyramids that exchange information after each of three levels, and a joint fourth level of their sum.

    Attributes:
      spec: the architecture.
    """

    def setup(self) -> None:
        """Declares the levels."""
        spec, depths = self.spec, self.spec.teacher_depths
        self.stream_a = [make_level(spec, i, depths[i]) for i in range(LEVELS)]
        self.stream_b = [make_level(spec, i, depths[i]) for i in range(LEVELS)]
        self.cross_update = [CrossBlock(spec.widths[i], spec) for i in range(LEVELS)]
        self.fused = make_level(spec, LEVELS, depths[LEVELS])
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
        if self._is_folded():
            return self._folded(jnp.stack([a, b]), train)
        found = {}
        for i in range(LEVELS):
            a, b = self.stream_a[i](a, train), self.stream_b[i](b, train)
            a, b, found[f"map_a{i}"], found[f"map_b{i}"] = self.cross_update[i](a, b, train)
            found[f"stream_a{i}"] = a
        return found | self.head(self.fused(a + b, train), train)

    @nn.nowrap
    def _folded(self, x: jax.Array, train: bool) -> Found:
        """The same for both stains in one array [2, B, H, W, 3]."""
        spec, own, found, stats = self.spec, self.variables, {}, {}
        for i in range(LEVELS):
            names, module = (f"stream_a_{i}", f"stream_b_{i}"), make_level(spec, i, spec.teacher_depths[i], parent=None)
            x, new = folded.stream_pair(module, [folded.part(own, name) for name in names], x, train)
            stats |= dict(zip(names, new))
            side, name = Side(spec.widths[i], spec, parent=None), f"cross_update_{i}"
            both = [folded.part(folded.part(own, name), stream) for stream in "ab"]
            x, maps, new = folded.cross_pair(side, both, x, train)
            stats[name] = dict(zip("ab", new))
            found |= {f"map_a{i}": maps[0], f"map_b{i}": maps[1], f"stream_a{i}": x[0]}
        last = make_level(spec, LEVELS, spec.teacher_depths[LEVELS], parent=None)
        x, stats["fused"] = folded.level(last, folded.part(own, "fused"), x[0] + x[1], train)
        self._record(stats)
        return found | self.head(x, train)


class Student(_Network):
    """The H&E pyramid alone, with maps of the same shapes as those of the teacher.

    Attributes:
      spec: the architecture.
    """

    def setup(self) -> None:
        """Declares the levels."""
        spec, depths = self.spec, self.spec.student_depths
        self.stream_a = [make_level(spec, i, depths[i]) for i in range(LEVELS)]
        self.cross_update = [SelfBlock(spec.widths[i], spec) for i in range(LEVELS)]
        self.joint = make_level(spec, LEVELS, depths[LEVELS])
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
            x, found[f"map_a{i}"] = self.cross_update[i](self._level(i, x, train), train)
            found[f"stream_a{i}"] = x
        return found | self.head(self._level(LEVELS, x, train), train)

    @nn.nowrap
    def _level(self, i: int, x: jax.Array, train: bool) -> jax.Array:
        if not self._is_folded():
            return ([*self.stream_a, self.joint][i])(x, train)
        name = "joint" if i == LEVELS else f"stream_a_{i}"
        module = make_level(self.spec, i, self.spec.student_depths[i], parent=None)
        x, stats = folded.level(module, folded.part(self.variables, name), x, train)
        self._record({name: stats})
        return x
