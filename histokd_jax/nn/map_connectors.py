"""Trained helpers of losses on feature maps: hint regressor, paraphraser and translator (FT), fusion blocks (ReviewKD).

Maps are [b, C, H, W]. Modules with batch norm hold the collection "batch_stats" and take `train`. All are trained with
the student (the paraphraser alone, before it) and are not part of the exported student.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

_SLOPE = 0.1


def _last(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


def _first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def _norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)


class HintRegressor(nn.Module):
    """FitNet's regressor to a teacher map: one convolution chosen by the sizes, batch norm, ReLU (section 4).

    Student twice as large: 3 x 3, stride 2; half as large: 4 x 4 transposed, stride 2; larger or equal: valid with
    kernel `1 + H_s - H_t`.

    Attributes:
      channels: of the teacher.
      size: height and width of the teacher.
      relu: False for AB, whose connector ends before the ReLU.
    """

    channels: int
    size: int
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[b, channels, size, size] of a square student map [b, C, H, H].

        Raises:
          ValueError: if no rule covers the sizes.
        """
        height = x.shape[2]
        if height == 2 * self.size:
            layer = nn.Conv(self.channels, (3, 3), strides=2, padding=1, name="conv")
        elif 2 * height == self.size:
            layer = nn.ConvTranspose(self.channels, (4, 4), strides=(2, 2), padding="SAME", name="conv")
        elif height >= self.size:
            layer = nn.Conv(self.channels, (1 + height - self.size,) * 2, padding="VALID", name="conv")
        else:
            raise ValueError(
                f"a student map of size {height} has no hint regressor to size {self.size}: choose layers of equal "
                "size, or a student twice or half as large, or larger"
            )
        x = _norm("norm", train)(layer(_last(x)))
        return _first(nn.relu(x) if self.relu else x)


class Paraphraser(nn.Module):
    """FT's teacher side: convolutions `C -> C -> C/2 -> C/2` and a mirrored transposed decoder, leaky ReLU 0.1.

    Trained first, alone, to reconstruct the teacher's map by mean squared error; no batch norm.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(factor [b, C/2, H, W], reconstruction [b, C, H, W]) of a teacher map."""
        channels, x = x.shape[1], _last(x)
        half = channels // 2
        for k, width in enumerate((channels, half, half)):
            x = nn.leaky_relu(nn.Conv(width, (3, 3), padding=1, name=f"encoder_{k}")(x), _SLOPE)
        factor = x
        for k, width in enumerate((half, channels, channels)):
            x = nn.leaky_relu(nn.ConvTranspose(width, (3, 3), padding="SAME", name=f"decoder_{k}")(x), _SLOPE)
        return _first(factor), _first(x)


class Translator(nn.Module):
    """FT's student side: the encoder of the paraphraser with batch norm.

    Attributes:
      channels: of the teacher's map; the factor has half of them.
    """

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Factor [b, channels / 2, H, W] of a student map [b, C, H, W]."""
        widths, x = (x.shape[1], self.channels // 2, self.channels // 2), _last(x)
        for k, width in enumerate(widths):
            x = nn.Conv(width, (3, 3), padding=1, name=f"encoder_{k}")(x)
            x = nn.leaky_relu(_norm(f"norm_{k}", train)(x), _SLOPE)
        return _first(x)


def _resized(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Nearest-neighbour resize of [b, H, W, C]."""
    return x if x.shape[1:3] == sizes else jax.image.resize(x, (x.shape[0], *sizes, x.shape[3]), "nearest")


class FusionBlock(nn.Module):
    """One level of ReviewKD: fuses a student map with the deeper fused map and brings it to the teacher's shape.

    Attributes:
      mid: channels of the fusion.
      channels: of the teacher.
      sizes: height and width of the teacher.
    """

    mid: int
    channels: int
    sizes: tuple[int, int]

    @nn.compact
    def __call__(self, x: jax.Array, deeper: jax.Array | None, train: bool) -> tuple[jax.Array, jax.Array]:
        """(map to compare, fused map for the next level), both [b, H, W, C]."""
        x = _norm("norm_in", train)(nn.Conv(self.mid, (1, 1), use_bias=False, name="conv_in")(x))
        if deeper is not None:
            deeper = _resized(deeper, x.shape[1:3])
            both = jnp.concatenate([x, deeper], axis=-1)
            gate = nn.sigmoid(nn.Conv(2, (1, 1), name="gate")(both))
            x = x * gate[..., :1] + deeper * gate[..., 1:]
        x = _resized(x, self.sizes)
        out = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False, name="conv_out")(x)
        return _norm("norm_out", train)(out), x


class ReviewFusion(nn.Module):
    """All levels of ReviewKD, top-down; the deepest is the pooled vector as a 1 x 1 map (Chen et al., 2104.09044).

    Attributes:
      teacher: (C, H, W) of every level of the teacher, shallow to deep, the pooled vector last as (C, 1, 1).
      limit: largest number of channels of the fusion.
    """

    teacher: Sequence[tuple[int, int, int]]
    limit: int = 512

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array], train: bool = False) -> list[jax.Array]:
        """Student maps of the teacher's shapes, shallow to deep, of the student's [b, C, H, W] of the same levels.

        Raises:
          ValueError: if the numbers of levels differ.
        """
        if len(maps) != len(self.teacher):
            raise ValueError(f"the student has {len(maps)} levels and the teacher {len(self.teacher)}")
        mid = min(self.limit, maps[-1].shape[1])
        deeper, found = None, []
        for level in reversed(range(len(maps))):
            channels, *sizes = self.teacher[level]
            block = FusionBlock(mid, channels, tuple(sizes), name=f"level_{level}")
            out, deeper = block(_last(maps[level]), deeper, train)
            found.append(_first(out))
        return found[::-1]
