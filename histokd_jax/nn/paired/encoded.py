"""A paired network whose first patches are the tokens of a patch encoder instead of the pixels of a random stem."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from histokd_jax.nn.encoders.build import build
from histokd_jax.nn.encoders.specs import ResNetSpec, Spec
from histokd_jax.nn.paired.networks import Found, Student, Teacher
from histokd_jax.nn.paired.spec import PairedSpec

ENCODER, PARTNER_ENCODER = "encoder", "partner_encoder"
"""Names of the encoders among the submodules."""


@dataclasses.dataclass(frozen=True)
class StemEncoder:
    """A patch encoder in the place of the stem.

    Attributes:
      spec: its architecture.
      multiplier, shift: per colour, from the standardised pixels of the networks to what the encoder expects.
      frozen: whether its weights stay as they are; both stains then share them. Otherwise every stream has its own.
    """

    spec: Spec
    multiplier: tuple[float, float, float] = (1.0, 1.0, 1.0)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    frozen: bool = True

    @property
    def stride(self) -> int:
        """Pixels between two tokens."""
        return 2 ** (len(self.spec.blocks) + 1) if isinstance(self.spec, ResNetSpec) else self.spec.patch

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.spec.features if isinstance(self.spec, ResNetSpec) else self.spec.width

    def behind(self, spec: PairedSpec) -> PairedSpec:
        """The architecture that reads the tokens: its first patch covers as many pixels as that of `spec`.

        Raises:
          ValueError: the stem is no multiple of the stride.
        """
        if spec.stem_patch % self.stride:
            raise ValueError(
                f"model.stem_patch = {spec.stem_patch} is no multiple of the {self.stride} pixels between two tokens "
                "of the encoder: set it to one"
            )
        return dataclasses.replace(spec, stem_patch=spec.stem_patch // self.stride, stem_inputs=self.width)


class Encoded(nn.Module):
    """`Teacher` or `Student` on the tokens of an encoder.

    The encoder runs in inference mode also in training (batch norms of a ResNet use its running statistics).

    Attributes:
      spec: the architecture, in pixels.
      stem: the encoder.
      paired: whether this is the teacher, which reads two stains.
    """

    spec: PairedSpec
    stem: StemEncoder
    paired: bool

    def setup(self) -> None:
        """Declares encoders and network."""
        spec, stem = self.spec, self.stem
        self.encoder = build(stem.spec, spec.dtype)
        if self.paired and not stem.frozen:
            self.partner_encoder = build(stem.spec, spec.dtype)
        self.network = (Teacher if self.paired else Student)(stem.behind(spec))

    def __call__(self, *given: jax.Array | bool) -> Found:
        """Runs encoder and network.

        Args:
          *given: tiles [B, H, W, 3] and perhaps `train`, as `Teacher` or `Student` take them.

        Returns:
          See `networks.Found`.
        """
        number = 2 if self.paired else 1
        second = self.partner_encoder if self.paired and not self.stem.frozen else self.encoder
        tokens = [self._tokens(encoder, x) for encoder, x in zip((self.encoder, second), given[:number])]
        return self.network(*tokens, *given[number:])

    @nn.nowrap
    def _tokens(self, encoder: nn.Module, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] standardised to tokens [B, H // stride, W // stride, width]."""
        stem = self.stem
        multiplier, shift = (jnp.asarray(v, x.dtype).reshape(1, 1, 1, 3) for v in (stem.multiplier, stem.shift))
        x = x * multiplier + shift
        if isinstance(stem.spec, ResNetSpec):
            found = encoder.feature_map(x)
        else:
            tokens = encoder.tokens(x)[:, stem.spec.prefix :]
            found = tokens.reshape(x.shape[0], x.shape[1] // stem.stride, x.shape[2] // stem.stride, stem.width)
        return lax.stop_gradient(found) if stem.frozen else found
