"""Convolutions, patches and norms of the paired networks, channels last (specification, sections 3 and 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from histokd_jax.nn.paired.spec import NormSpec
from histokd_jax.ops.depthwise import depthwise

CONV_STD, LINEAR_STD = 0.02, 0.01
_CUT = 2.0


def normal(std: float) -> nn.initializers.Initializer:
    """Normal(0, std) cut at +-2: at 100 or 200 standard deviations, so a bound and no redrawing."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jnp.clip(std * jax.random.normal(key, shape, dtype), -_CUT, _CUT)

    return init


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """The exact (error-function) form; a loop over blocks keeps one array of it for the backward pass, its slope."""
    return x * _normal_cdf(x)


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (t,) = primals, tangents
    cdf = _normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * jnp.asarray(math.sqrt(0.5 / math.pi), x.dtype)
    return x * cdf, t * (cdf + x * density)


def _normal_cdf(x: jax.Array) -> jax.Array:
    """Standard normal distribution function; erfc keeps its lower tail exact."""
    return 0.5 * lax.erfc(x * jnp.asarray(-math.sqrt(0.5), x.dtype))


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32 or float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def per_channel(vector: jax.Array, ndim: int) -> jax.Array:
    """A vector [C] as [1, ..., 1, C]."""
    return vector.reshape((1,) * (ndim - 1) + (-1,))


def operands(x: jax.Array, *weights: jax.Array | None, dtype: jnp.dtype | None) -> list[jax.Array | None]:
    """Input and weights in the compute dtype; None promotes them to a common one."""
    if dtype is None:
        dtype = jnp.promote_types(x.dtype, weights[0].dtype)
    return [None if value is None else value.astype(dtype) for value in (x, *weights)]


class Conv(nn.Module):
    """A dense convolution of stride 1 that keeps the grid.

    Attributes:
      inputs: channels of the input.
      features: channels of the output.
      side: of the kernel, odd.
      use_bias: whether there is a bias.
      dtype: compute dtype.
    """

    inputs: int
    features: int
    side: int = 1
    use_bias: bool = True
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, inputs] to [B, H, W, features]."""
        kernel = self.param("kernel", normal(CONV_STD), (self.side, self.side, self.inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        x, kernel, bias = operands(x, kernel, bias, dtype=self.dtype)
        y = jnp.matmul(x, kernel[0, 0]) if self.side == 1 else _convolve(x, kernel)
        return y if bias is None else y + per_channel(bias, y.ndim)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    return lax.conv_general_dilated(x, kernel, (1, 1), pad, None, None, ("NHWC", "HWIO", "NHWC"))


class Depthwise(nn.Module):
    """A depth-wise convolution with bias.

    Attributes:
      features: C.
      side: of the kernel, odd.
      dtype: compute dtype.
      form: see `histokd_jax.ops.depthwise`.
    """

    features: int
    side: int
    dtype: jnp.dtype | None = None
    form: str = "shifts"

    def setup(self) -> None:
        """Declares the parameters."""
        self.kernel = self.param("kernel", normal(CONV_STD), (self.side, self.side, 1, self.features))
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same shape."""
        x, kernel, bias = operands(x, self.kernel, self.bias, dtype=self.dtype)
        return depthwise(x, kernel, self.form) + per_channel(bias, x.ndim)

    def weights(self) -> tuple[jax.Array, jax.Array]:
        """(kernel [side, side, 1, C], bias [C]) as stored."""
        return self.kernel, self.bias


class Separable(nn.Module):
    """DS: a depth-wise 3x3 and a 1x1 convolution, both with bias, nothing between.

    Attributes:
      inputs: channels of the input.
      features: channels of the output.
      dtype: compute dtype.
      form: see `histokd_jax.ops.depthwise`.
    """

    inputs: int
    features: int
    dtype: jnp.dtype | None = None
    form: str = "shifts"

    def setup(self) -> None:
        """Declares the layers."""
        self.depth = Depthwise(self.inputs, 3, self.dtype, self.form)
        self.point = Conv(self.inputs, self.features, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, inputs] to [B, H, W, features]."""
        return self.point(self.depth(x))


def separable_together(layers: Sequence[Separable], x: jax.Array) -> list[jax.Array]:
    """`[layer(x) for layer in layers]` with one depth-wise convolution for all of them.

    Args:
      layers: of one compute dtype and form.
      x: [B, H, W, inputs].

    Returns:
      The outputs of the layers.
    """
    kernels, biases = zip(*(layer.depth.weights() for layer in layers))
    first = layers[0].depth
    x, kernel, bias = operands(x, jnp.concatenate(kernels, -1), jnp.concatenate(biases), dtype=first.dtype)
    y = depthwise(jnp.concatenate([x] * len(layers), -1), kernel, first.form) + per_channel(bias, x.ndim)
    return [layer.point(part) for layer, part in zip(layers, jnp.split(y, len(layers), axis=-1))]


class BatchNorm(nn.Module):
    """Batch norm whose statistics are those of the whole batch, on however many devices it lies.

    Running statistics are the collection `batch_stats`. In training they are updated if the collection is mutable.

    Attributes:
      features: C.
      norm: eps, update and the kind of running variance.
    """

    features: int
    norm: NormSpec

    def setup(self) -> None:
        """Declares parameters and statistics."""
        self.scale = self.param("scale", nn.initializers.ones, (self.features,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.features,))
        self.mean = self.variable("batch_stats", "mean", jnp.zeros, (self.features,))
        self.var = self.variable("batch_stats", "var", jnp.ones, (self.features,))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises over all axes but the last.

        Args:
          x: [..., C] float.
          train: statistics of this batch, else the running ones.

        Returns:
          Array like `x`.
        """
        wide = at_least_float32(x)
        axes = tuple(range(x.ndim - 1))
        mean, var = (jnp.mean(wide, axes), None) if train else self.running()
        # One array for the variance, the result and the backward pass of both.
        centred = wide - per_channel(mean, x.ndim)
        if train:
            var = jnp.mean(centred * centred, axes)
            self.record(mean, var, x.size // self.features)
        _, multiplier, shift = self.factors(mean, var)
        return (centred * per_channel(multiplier, x.ndim) + per_channel(shift, x.ndim)).astype(x.dtype)

    def running(self) -> tuple[jax.Array, jax.Array]:
        """(mean, variance) [C] for inference."""
        return self.mean.value, self.var.value

    def factors(self, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(mean, multiplier, shift) [C]: the norm is (x - mean) * multiplier + shift."""
        return mean, self.scale * lax.rsqrt(var + self.norm.eps), self.bias

    def record(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        """Moves the running statistics towards those of a batch.

        Args:
          mean: [C].
          var: [C], biased.
          count: values per channel.

        Raises:
          ValueError: for one value per channel, which has no variance.
        """
        if count < 2:
            raise ValueError(
                "a batch norm in training met one value per channel: use at least two images per step (train.b >= 2)"
            )
        if self.is_initializing() or not self.is_mutable_collection("batch_stats"):
            return
        var = var * (count / (count - 1)) if self.norm.unbiased else var
        for variable, new in ((self.mean, mean), (self.var, var)):
            old = variable.value
            variable.value = ((1.0 - self.norm.update) * old + self.norm.update * lax.stop_gradient(new)).astype(
                old.dtype
            )


class GroupNorm(nn.Module):
    """Group norm with one group: statistics of each image over its grid and channels.

    Attributes:
      features: C.
      eps: added to the variance.
    """

    features: int
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] to the same shape, at least float32."""
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = at_least_float32(x)
        axes = tuple(range(1, x.ndim))
        centred = x - jnp.mean(x, axes, keepdims=True)
        unit = centred * lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + self.eps)
        return unit * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)


class Linear(nn.Module):
    """A linear layer with bias.

    Attributes:
      inputs: width of the input.
      features: width of the output.
    """

    inputs: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, inputs] to [B, features]."""
        kernel = self.param("kernel", normal(LINEAR_STD), (self.inputs, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return jnp.matmul(x, kernel) + per_channel(bias, x.ndim)


class PatchEmbed(nn.Module):
    """Patch: a convolution of stride = side without padding, and a batch norm.

    Attributes:
      inputs: channels of the input.
      features: channels of the output.
      side: of a patch; rows and columns that fill none are left out.
      norm: of the batch norm.
      dtype: compute dtype.
    """

    inputs: int
    features: int
    side: int
    norm: NormSpec
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, inputs] to [B, H // side, W // side, features]."""
        shape = (self.side, self.side, self.inputs, self.features)
        kernel = self.param("kernel", normal(CONV_STD), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = operands(x, kernel, bias, dtype=self.dtype)
        # Patches do not overlap: their convolution is one matrix product.
        y = jnp.matmul(_patches(x, self.side), kernel.reshape(-1, self.features)) + per_channel(bias, x.ndim)
        return BatchNorm(self.features, self.norm, name="norm")(y, train)


def _patches(x: jax.Array, side: int) -> jax.Array:
    """[B, H, W, C] to [B, H // side, W // side, side * side * C], pixels of a patch in row-major order."""
    batch, height, width, channels = x.shape
    rows, columns = height // side, width // side
    x = x[:, : rows * side, : columns * side].reshape(batch, rows, side, columns, side, channels)
    return jnp.swapaxes(x, 2, 3).reshape(batch, rows, columns, -1)
