"""The device side: batches of tiles of one fixed shape to embeddings, divided over devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from histokd_jax.embed.transform import Stain, prepare
from histokd_jax.encoders.loading import LoadedEncoder
from histokd_jax.encoders.presets import Encoder
from histokd_jax.nn.encoders import build
from histokd_jax.train import sharding

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How embeddings are computed.

    Attributes:
      batch: tiles per step over all devices; the last of a slide is filled up.
      dtype: of products; norms and softmax are float32 in any case. float32 products are exact to float32 (no TF32).
      attention: "xla", or "cudnn" for fused attention in bfloat16 on GPUs.
      devices: how many; 0 takes all.
    """

    batch: int = 64
    dtype: str = "float32"
    attention: str = "xla"
    devices: int = 0


def embed_function(
    encoder: Encoder, compute: Compute, stain: Stain | None = None
) -> Callable[[Mapping[str, Any], jax.Array, Any], jax.Array]:
    """The pure function (variables, uint8 tiles [B, h, h, 3], stain parameters) -> float32 [B, features].

    Args:
      encoder: architecture and conventions.
      compute: dtype and attention.
      stain: a stain normalisation.
    """
    half = compute.dtype == "bfloat16"
    module = build.build(encoder.spec, jnp.bfloat16 if half else None, compute.attention)

    def embed(variables: Mapping[str, Any], tiles: jax.Array, parameters: Any = None) -> jax.Array:
        with jax.default_matmul_precision("default" if half else "highest"):
            images = prepare(tiles, encoder.transform, stain, parameters)
            return module.apply(variables, images).astype(jnp.float32)

    return embed


class Embedder:
    """An encoder on its devices: one compiled program for one shape of tiles.

    Args:
      loaded: encoder and weights.
      compute: how.
      stain: a stain normalisation.

    Attributes:
      features: width of an embedding.
      batch: tiles per step.
      stain: the stain normalisation, or None.
      sha256: of the weights.

    Raises:
      ValueError: a batch that the devices cannot divide, or an unknown dtype or attention.
    """

    def __init__(self, loaded: LoadedEncoder, compute: Compute, stain: Stain | None = None):
        self.mesh = sharding.make_mesh(compute.devices)
        _check(compute, self.mesh.shape[sharding.DATA])
        self.features, self.batch = loaded.encoder.features, compute.batch
        self.stain, self.sha256 = stain, loaded.sha256
        self._tiles = NamedSharding(self.mesh, PartitionSpec(sharding.DATA))
        everywhere = sharding.replicated(self.mesh)
        self._run = jax.jit(
            embed_function(loaded.encoder, compute, stain),
            in_shardings=(everywhere, self._tiles, everywhere),
            out_shardings=self._tiles,
        )
        self._variables = jax.device_put(_stored(loaded.variables, compute), everywhere)

    def __call__(self, tiles: np.ndarray, parameters: Any = None) -> jax.Array:
        """Starts a step and returns at once; reading the result waits for it.

        Args:
          tiles: uint8 [batch, h, h, 3] of one slide.
          parameters: what `stain.fit` found in the slide.

        Returns:
          float32 [batch, features] on the devices.
        """
        return self._run(self._variables, jax.device_put(tiles, self._tiles), parameters)


def _check(compute: Compute, devices: int) -> None:
    if compute.batch < 1 or compute.batch % devices:
        raise ValueError(f"a batch of {compute.batch} tiles cannot be divided over {devices} devices: use a multiple")
    if compute.dtype not in DTYPES:
        raise ValueError(f"dtype {compute.dtype!r} is unknown; expected one of {DTYPES}")
    if compute.attention == "cudnn" and (compute.dtype != "bfloat16" or jax.default_backend() != "gpu"):
        raise ValueError("attention 'cudnn' needs bfloat16 on a GPU; use 'xla'")


def _stored(variables: Mapping[str, Any], compute: Compute) -> Mapping[str, Any]:
    """Kernels in the dtype in which they are multiplied: the same values as casting them in every step, less memory."""
    if compute.dtype != "bfloat16":
        return variables

    def cast(path: Any, value: np.ndarray) -> Any:
        return value.astype(jnp.bfloat16) if path[-1].key == "kernel" else value

    return jax.tree_util.tree_map_with_path(cast, variables)
