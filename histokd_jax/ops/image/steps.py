"""Steps of an augmentation: what is drawn, with which probability, and the geometric ones.

A step is `step(key, image)` for ONE image; `chosen`, `draw` and `apply` are its parts, so that the arithmetic can be
checked for given numbers. Steps are immutable and hashable: a pipeline is a tuple of them, a static argument of `jit`.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from histokd_jax.ops.dropout import mix32
from histokd_jax.ops.image import geometry

Drawn = Mapping[str, jax.Array]
_GOLDEN = np.uint32(0x9E3779B1)
WIDTH = 8
"""Uniform numbers that every step has for its key: the first decides whether it is applied, the others are its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(abc.ABC):
    """One step of a pipeline.

    Attributes:
      probability: with which the step is applied to an example, in [0, 1].
      geometric: whether it moves pixels; such steps can be shared between the views of an example.
      pointwise: whether a pixel of the result depends on the same pixel of the image alone.
    """

    probability: float = 1.0
    geometric: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ValueError(f"{type(self).__name__}: probability is {self.probability}; expected a number in [0, 1]")

    def chosen(self, key: jax.Array) -> jax.Array:
        """[] bool: whether the step is applied for this key."""
        return units(key)[0] < self.probability

    def numbers(self, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """What `apply` takes for this key, whether the step is chosen or not."""
        return self.draw(units(key)[1:], key, shape)

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """The arguments of `apply`.

        Args:
          unit: [WIDTH - 1] float32 uniform in [0, 1), for single numbers.
          key: for arrays: `array_key(key)`.
          shape: of the image.

        Returns:
          name -> array.
        """
        return {}

    @abc.abstractmethod
    def apply(self, image: jax.Array, **drawn: jax.Array) -> jax.Array:
        """The changed image."""

    def run(self, unit: jax.Array, key: jax.Array, image: jax.Array) -> jax.Array:
        """`__call__` with `units(key)` given, so that a pipeline draws those of all steps at once."""
        if self.probability == 0:
            return image
        changed = self.apply(image, **self.draw(unit[1:], key, image.shape))
        if self.probability == 1:
            return changed
        return jnp.where(unit[0] < self.probability, changed, image.astype(changed.dtype))

    def __call__(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """The image, changed with the step's probability.

        Args:
          key: typed PRNG key of this step for this example.
          image: [H, W, C], or [K] for steps of vectors.

        Returns:
          The changed image, or the same one in the dtype of the changed one.
        """
        return self.run(units(key), key, image)


def units(key: jax.Array) -> jax.Array:
    """[WIDTH] float32, uniform in [0, 1)."""
    return jax.random.uniform(key, (WIDTH,), jnp.float32)


def array_key(key: jax.Array) -> jax.Array:
    """The key for arrays of a step, independent of `units(key)`."""
    return jax.random.fold_in(key, 1)


def field(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32 of `shape`, uniform in [0, 1): a hash of the element's number and the key.

    For pictures of noise, which are drawn for every example, needed or not: a few integer operations per element.
    """
    words = jax.random.key_data(key)
    index = jnp.arange(1, math.prod(shape) + 1, dtype=jnp.uint32)
    bits = mix32(mix32(index * _GOLDEN + words[0]) ^ words[-1])
    return ((bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)).reshape(shape)


def spread(unit: jax.Array, low: float, high: float) -> jax.Array:
    """Uniform numbers in [0, 1) to [low, high)."""
    return low + unit * (high - low)


def check_range(step: Any, name: str, value: tuple[float, float], least: float | None = None) -> None:
    """Refuses an interval that is empty or begins below `least`.

    Raises:
      ValueError: naming the step and the field.
    """
    low, high = value
    if not low <= high or (least is not None and low < least):
        bound = "" if least is None else f", {least} <= low"
        raise ValueError(f"{type(step).__name__}: {name} is {value}; expected (low, high) with low <= high{bound}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HorizontalFlip(Step):
    """Mirrors left and right; the dtype stays."""

    probability: float = 0.5
    geometric: ClassVar[bool] = True
    pointwise: ClassVar[bool] = False

    def apply(self, image: jax.Array) -> jax.Array:
        """See `geometry.flip`."""
        return image[:, ::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalFlip(Step):
    """Mirrors top and bottom; the dtype stays."""

    probability: float = 0.5
    geometric: ClassVar[bool] = True
    pointwise: ClassVar[bool] = False

    def apply(self, image: jax.Array) -> jax.Array:
        """See `geometry.flip`."""
        return image[::-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuarterTurns(Step):
    """Turns a square image by 0, 90, 180 or 270 degrees, each equally likely; exact, the dtype stays."""

    geometric: ClassVar[bool] = True
    pointwise: ClassVar[bool] = False

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """quarters: [] int32 in 0..3."""
        return {"quarters": jnp.floor(4 * unit[0]).astype(jnp.int32)}

    def apply(self, image: jax.Array, quarters: jax.Array) -> jax.Array:
        """See `geometry.rotate_quarters`."""
        return geometry.rotate_quarters(image, quarters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate(Step):
    """Turns by a uniform angle about the centre, inside the frame (A4 step 7).

    Attributes:
      angle: (low, high) in radians, counter-clockwise.
      interpolation: "nearest" or "bilinear".
      fill: value of pixels from beyond the frame.
    """

    angle: tuple[float, float] = (0.0, 3.141592653589793)
    interpolation: str = geometry.NEAREST
    fill: float = 0.0
    geometric: ClassVar[bool] = True
    pointwise: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "angle", self.angle)
        geometry.check_interpolation(self.interpolation)

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """angle: [] float32."""
        return {"angle": spread(unit[0], *self.angle)}

    def apply(self, image: jax.Array, angle: jax.Array) -> jax.Array:
        """See `geometry.rotate`."""
        return geometry.rotate(image, angle, self.interpolation, self.fill)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomCrop(Step):
    """Cuts a window and stretches it to the output size (A4 step 4).

    Height and width are drawn independently, `floor(U[low, high) * side)`, and the position uniformly.

    Attributes:
      fraction: (low, high) of the sides, in (0, 1].
      size: (rows, columns) of the result; None for those of the image. Needs probability 1 where it differs from them.
      interpolation: "bilinear" or "nearest".
    """

    fraction: tuple[float, float] = (0.75, 1.0)
    size: tuple[int, int] | None = None
    interpolation: str = geometry.BILINEAR
    geometric: ClassVar[bool] = True
    pointwise: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "fraction", self.fraction, 0.0)
        if not 0 < self.fraction[0] or self.fraction[1] > 1:
            raise ValueError(f"RandomCrop: fraction is {self.fraction}; expected 0 < low <= high <= 1")
        geometry.check_interpolation(self.interpolation)

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """top, left, height, width: [] int32, a window inside the image."""
        height, width = (self._side(u, side) for u, side in zip(unit[:2], shape[:2]))
        top, left = (_position(u, side - own) for u, side, own in zip(unit[2:4], shape[:2], (height, width)))
        return {"top": top, "left": left, "height": height, "width": width}

    def _side(self, unit: jax.Array, side: int) -> jax.Array:
        drawn = jnp.floor(spread(unit, *self.fraction) * side).astype(jnp.int32)
        return jnp.clip(drawn, 1, side)

    def apply(
        self, image: jax.Array, top: jax.Array, left: jax.Array, height: jax.Array, width: jax.Array
    ) -> jax.Array:
        """See `geometry.crop_resize`."""
        size = self.size or image.shape[:2]
        if self.probability < 1 and tuple(size) != image.shape[:2]:
            raise ValueError(
                f"RandomCrop: size is {size}, images are {image.shape[:2]} and probability is {self.probability}: "
                "examples would differ in size; set probability to 1"
            )
        return geometry.crop_resize(image, top, left, height, width, size, self.interpolation)


def _position(unit: jax.Array, room: jax.Array) -> jax.Array:
    """Uniform integer in 0..room."""
    return jnp.minimum(jnp.floor(unit * (room + 1)).astype(jnp.int32), room)
