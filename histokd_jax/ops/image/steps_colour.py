"""Steps that change colours but move nothing; all give float32 on the scale 0..255."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax

from histokd_jax.ops.image import photometric
from histokd_jax.ops.image.steps import Drawn, Step, check_range, field, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZerosToNoise(Step):
    """Every element that is exactly 0 becomes its own U[0, 256) (A4 step 5)."""

    probability: float = 0.3

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """noise: float32 of the image's shape."""
        return {"noise": 256 * field(key, shape)}

    def apply(self, image: jax.Array, noise: jax.Array) -> jax.Array:
        """See `photometric.fill_zeros`."""
        return photometric.fill_zeros(image, noise)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solarise(Step):
    """Values at or above a random threshold are inverted (A4 step 8).

    Attributes:
      threshold: (low, high) before scaling; the authors' U[0.1, 6) / 10.
      scale: factor of the threshold: 1 as released, where nearly every pixel of a 0..255 image is inverted; 255 as the
        numbers were meant (deviation 7).
    """

    probability: float = 0.3
    threshold: tuple[float, float] = (0.01, 0.6)
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "threshold", self.threshold)

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """threshold: [] float32, scaled."""
        return {"threshold": spread(unit[0], *self.threshold) * self.scale}

    def apply(self, image: jax.Array, threshold: jax.Array) -> jax.Array:
        """See `photometric.solarise`."""
        return photometric.solarise(image, threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brightness(Step):
    """Adds one number to the whole image (A4 step 9).

    Attributes:
      delta: largest magnitude, in grey levels: 0.4 as released, 0.4 * 255 corrected (deviation 8).
    """

    delta: float = 0.4

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "delta", (0.0, self.delta))

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """delta: [] float32."""
        return {"delta": spread(unit[0], -self.delta, self.delta)}

    def apply(self, image: jax.Array, delta: jax.Array) -> jax.Array:
        """See `photometric.brightness`."""
        return photometric.brightness(image, delta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrast(Step):
    """Stretches every channel about its mean (A4 step 10).

    Attributes:
      factor: (low, high).
    """

    factor: tuple[float, float] = (0.6, 1.4)
    pointwise: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "factor", self.factor, 0.0)

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """factor: [] float32."""
        return {"factor": spread(unit[0], *self.factor)}

    def apply(self, image: jax.Array, factor: jax.Array) -> jax.Array:
        """See `photometric.contrast`."""
        return photometric.contrast(image, factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saturation(Step):
    """Scales HSV saturation (A4 step 11).

    Attributes:
      factor: (low, high).
    """

    factor: tuple[float, float] = (0.6, 1.4)

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "factor", self.factor, 0.0)

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """factor: [] float32."""
        return {"factor": spread(unit[0], *self.factor)}

    def apply(self, image: jax.Array, factor: jax.Array) -> jax.Array:
        """See `photometric.saturation`."""
        return photometric.saturation(image, factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hue(Step):
    """Turns HSV hue (A4 step 12).

    Attributes:
      shift: largest magnitude, in turns.
    """

    shift: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "shift", (0.0, self.shift))

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """shift: [] float32."""
        return {"shift": spread(unit[0], -self.shift, self.shift)}

    def apply(self, image: jax.Array, shift: jax.Array) -> jax.Array:
        """See `photometric.hue`."""
        return photometric.hue(image, shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StainJitter(Step):
    """Scales and shifts haematoxylin, eosin and DAB independently (Tellez et al. 2018).

    Attributes:
      sigma: scale is U[1 - sigma, 1 + sigma), offset U[-sigma, sigma) in natural-log density (0.05 is their light
        variant, 0.2 the strong one; they state the offset in another unit of density).
    """

    sigma: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "sigma", (0.0, self.sigma))

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """scale, offset: [3] float32."""
        return {
            "scale": spread(unit[:3], 1 - self.sigma, 1 + self.sigma),
            "offset": spread(unit[3:6], -self.sigma, self.sigma),
        }

    def apply(self, image: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
        """See `photometric.jitter_stains`."""
        return photometric.jitter_stains(image, scale, offset)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip(Step):
    """To [0, 255] (A4 step 13)."""

    def apply(self, image: jax.Array) -> jax.Array:
        """See `photometric.clip`."""
        return photometric.clip(image)
