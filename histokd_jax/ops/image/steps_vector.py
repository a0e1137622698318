"""Steps of vectors of expression values (More From Less, B5); all give float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from histokd_jax.ops.image import vectors
from histokd_jax.ops.image.steps import Drawn, Step, array_key, check_range, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogNormalise(Step):
    """ln(1 + counts scaled to a common sum), so that unit noise does not swamp low counts (deviation 22, corrected).

    Attributes:
      total: common sum.
    """

    total: float = 1e4

    def __post_init__(self):
        super().__post_init__()
        if not self.total > 0:
            raise ValueError(f"LogNormalise: total is {self.total}; expected a positive number")

    def apply(self, image: jax.Array) -> jax.Array:
        """See `vectors.log_normalise`."""
        return vectors.log_normalise(image, self.total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskGenes(Step):
    """Zeroes each gene with a probability that is drawn once per example (B5 step 2).

    Attributes:
      rate: (low, high) of that probability.
    """

    rate: tuple[float, float] = (0.0, 0.2)

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "rate", self.rate, 0.0)

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """keep: [K] bool."""
        return {"keep": jax.random.uniform(array_key(key), shape) >= spread(unit[0], *self.rate)}

    def apply(self, image: jax.Array, keep: jax.Array) -> jax.Array:
        """See `vectors.mask`."""
        return vectors.mask(image, keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PermuteGenes(Step):
    """floor(K q) random genes exchange their values (B5 step 3 as intended; deviation 21, corrected).

    The released code writes the values back where they came from: the faithful preset therefore has no such step.

    Attributes:
      rate: (low, high) of q.
    """

    rate: tuple[float, float] = (0.0, 0.1)

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "rate", self.rate, 0.0)
        if self.rate[1] > 1:
            raise ValueError(f"PermuteGenes: rate is {self.rate}; expected (low, high) within [0, 1]")

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """order: [K] int32, a permutation; chosen: [] int32, how many of its first genes take part."""
        chosen = jnp.floor(spread(unit[0], *self.rate) * shape[0]).astype(jnp.int32)
        return {"order": jnp.argsort(jax.random.bits(array_key(key), shape)), "chosen": chosen}

    def apply(self, image: jax.Array, order: jax.Array, chosen: jax.Array) -> jax.Array:
        """See `vectors.permute_chosen`."""
        return vectors.permute_chosen(image, order, chosen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianNoise(Step):
    """Adds N(0, sigma^2) to each gene independently (B5 step 4).

    Attributes:
      sigma: standard deviation, in the unit of the values.
    """

    sigma: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "sigma", (0.0, self.sigma))

    def draw(self, unit: jax.Array, key: jax.Array, shape: tuple[int, ...]) -> Drawn:
        """noise: [K] float32."""
        return {"noise": self.sigma * jax.random.normal(array_key(key), shape, jnp.float32)}

    def apply(self, image: jax.Array, noise: jax.Array) -> jax.Array:
        """See `vectors.add_noise`."""
        return vectors.add_noise(image, noise)
