"""Bottleneck ResNet on NHWC images; convolutions in any dtype, batch norms in float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.encoders.specs import HE, ResNetSpec


class ResNet(nn.Module):
    """A bottleneck ResNet without a head.

    Attributes:
      spec: the architecture.
      dtype: of the convolutions' operands and results; None keeps float32. Parameters, batch norms and residual sums
        stay float32.
    """

    spec: ResNetSpec
    dtype: jnp.dtype | None = None

    def setup(self) -> None:
        """Declares the layers."""
        spec = self.spec
        self.stem = Convolution(spec, spec.width, 7, 2, dtype=self.dtype)
        places = [(stage, block) for stage, count in enumerate(spec.blocks) for block in range(count)]
        self.blocks = [
            Bottleneck(
                spec, spec.width * 2**stage, 2 if stage and not block else 1, not block, self.dtype,
                name=f"stage{stage}_block{block}",
            )
            for stage, block in places
        ]  # fmt: skip

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Embeds images.

        Args:
          images: [B, h, w, 3] float.
          train: normalise by the batch and update the collection "batch_stats" (which must then be mutable), instead
            of using the running averages.

        Returns:
          [B, features] float32.
        """
        return jnp.mean(self.feature_map(images, train), axis=(1, 2))

    def feature_map(self, images: jax.Array, train: bool = False) -> jax.Array:
        """[B, h, w, 3] -> [B, h / 2**(stages + 1), w / 2**(stages + 1), features] float32, edges rounded up."""
        self.spec.check_image(*images.shape[1:3])
        x = nn.relu(self.stem(images, train))
        # Behind a ReLU, padding with zeros and with -inf are the same.
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x, train)
        return x


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut.

    Attributes:
      spec: of the network.
      inner: channels between the convolutions; four times that come out.
      stride: of the block.
      project: whether the shortcut is a 1x1 convolution.
      dtype: as `ResNet`.
    """

    spec: ResNetSpec
    inner: int
    stride: int
    project: bool
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, h, w, c] to [B, h / stride, w / stride, 4 inner] float32."""
        first, second = (1, self.stride) if self.spec.stride_in_3x3 else (self.stride, 1)
        y = nn.relu(self._convolution(self.inner, 1, first, "conv1")(x, train))
        y = nn.relu(self._convolution(self.inner, 3, second, "conv2")(y, train))
        y = self._convolution(4 * self.inner, 1, 1, "conv3")(y, train)
        if self.project:
            x = self._convolution(4 * self.inner, 1, self.stride, "shortcut")(x, train)
        return nn.relu(x + y)

    def _convolution(self, features: int, kernel: int, stride: int, name: str) -> Convolution:
        return Convolution(self.spec, features, kernel, stride, self.dtype, name=name)


class Convolution(nn.Module):
    """A convolution, padded by half its kernel on all sides, and a batch norm.

    Attributes:
      spec: of the network.
      features: output channels.
      kernel: edge.
      stride: of the convolution.
      dtype: as `ResNet`.
    """

    spec: ResNetSpec
    features: int
    kernel: int
    stride: int = 1
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, h, w, c] to [B, h / stride, w / stride, features] float32."""
        spec, half = self.spec, self.kernel // 2
        he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            (self.stride, self.stride),
            ((half, half), (half, half)),
            use_bias=spec.conv_bias,
            dtype=self.dtype,
            kernel_init=he if spec.kernel_init == HE else nn.initializers.glorot_uniform(),
            name="conv",
        )(x)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=spec.bn_momentum,
            epsilon=spec.bn_eps,
            dtype=jnp.float32,
            use_fast_variance=False,
            name="norm",
        )(x)
