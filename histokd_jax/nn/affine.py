"""The linear layer every network is made of, and its initialisers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

LECUN_NORMAL = "lecun_normal_zero_bias"
TORCH_DEFAULT = "torch_default"
INITIALIZERS = (TORCH_DEFAULT, LECUN_NORMAL)

Initializer = Callable[..., jax.Array]
AffineParams = Mapping[str, jax.Array]
"""{"kernel": [in, out], "bias": [out]}."""
ColumnParams = Mapping[str, jax.Array]
"""{"kernel_t": [out, in], "bias": [out]}: the layout of products on feature-major activations."""


def symmetric_uniform(bound: float) -> Initializer:
    """Initialiser drawing from Uniform(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def initializers(name: str, fan_in: int) -> tuple[Initializer, Initializer]:
    """Kernel and bias initialisers of a linear layer (MKD specification, section 4.5).

    Args:
      name: `lecun_normal_zero_bias` (Normal(0, 1/sqrt(fan_in)), bias 0) or `torch_default` (both Uniform of half-width
        1/sqrt(fan_in)).
      fan_in: input width.

    Returns:
      (kernel initialiser, bias initialiser).

    Raises:
      ValueError: if the name is unknown.
    """
    scale = 1.0 / math.sqrt(fan_in)
    if name == LECUN_NORMAL:
        return nn.initializers.normal(scale), nn.initializers.zeros
    if name == TORCH_DEFAULT:
        return symmetric_uniform(scale), symmetric_uniform(scale)
    raise ValueError(f"initialiser {name!r} is unknown; use one of {INITIALIZERS}")


def operand(x: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """`x` in the compute dtype; None promotes it to at least float32."""
    return x.astype(dtype if dtype is not None else jnp.promote_types(x.dtype, jnp.float32))


def affine(params: AffineParams, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`x @ kernel + bias` with operands in `dtype` and the sum in at least float32.

    Args:
      params: kernel [in, out], bias [out].
      x: [..., in] float.
      dtype: compute dtype of the operands; None keeps their own.

    Returns:
      [..., out] float32 (float64 for float64 parameters).
    """
    kernel, bias = params["kernel"], params["bias"]
    total = jnp.promote_types(kernel.dtype, jnp.float32)
    if dtype is None:
        y = jnp.matmul(operand(x, None), operand(kernel, None), preferred_element_type=total)
    else:
        y = low_product(x.reshape(-1, x.shape[-1]), kernel, 1, 0, dtype).reshape(*x.shape[:-1], kernel.shape[1])
    return y + bias.reshape((1,) * (y.ndim - 1) + (-1,)).astype(total)


def affine_columns(params: ColumnParams, h: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`affine` on feature-major activations: `kernel_t @ h + bias`.

    Args:
      params: kernel_t [out, in], bias [out].
      h: [in, n] float.
      dtype: compute dtype of the operands; None keeps their own.

    Returns:
      [out, n] float32 (float64 for float64 parameters).
    """
    return _contract(params, h, axis=0, dtype=dtype)


def affine_to_columns(params: ColumnParams, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """`affine` from row-major input to feature-major output.

    Args:
      params: kernel_t [out, in], bias [out].
      x: [n, in] float.
      dtype: compute dtype of the operands; None keeps their own.

    Returns:
      [out, n] float32 (float64 for float64 parameters).
    """
    return _contract(params, x, axis=1, dtype=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def known_product(params: ColumnParams, x: jax.Array, y: jax.Array, axis: int, dtype: jnp.dtype | None) -> jax.Array:
    """A product whose value is at hand: returns it, and has the derivatives of the product in `params` and `x`.

    Args:
      params: kernel_t [out, in], bias [out].
      x: the operand: [in, n] for axis 0 (`affine_columns`), [n, in] for axis 1 (`affine_to_columns`).
      y: [out, n], the value computed before.
      axis: the contracted axis of `x`.
      dtype: compute dtype of the operands; None keeps their own.

    Returns:
      `y`.
    """
    return y


def _known_forward(params, x, y, axis, dtype):
    return y, (params, x)


def _known_backward(axis, dtype, residuals, g):
    _, pull = jax.vjp(lambda params, x: _contract(params, x, axis, dtype), *residuals)
    return (*pull(g), None)


known_product.defvjp(_known_forward, _known_backward)


def _contract(params: ColumnParams, x: jax.Array, axis: int, dtype: jnp.dtype | None) -> jax.Array:
    kernel, bias = params["kernel_t"], params["bias"]
    total = jnp.promote_types(kernel.dtype, jnp.float32)
    if dtype is None:
        # dot_general does not promote: float32 input must follow float64 parameters.
        x = operand(x, None).astype(jnp.promote_types(kernel.dtype, jnp.float32))
        y = _dot(operand(kernel, None), x, 1, axis, total)
    else:
        y = low_product(kernel, x, 1, axis, dtype)
    return y + bias.astype(total)[:, None]


def _dot(a: jax.Array, b: jax.Array, i: int, j: int, total: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def low_product(a: jax.Array, b: jax.Array, i: int, j: int, dtype: jnp.dtype) -> jax.Array:
    """Product of two matrices with operands in `dtype`, sums in at least float32, in both directions.

    Automatic differentiation would multiply float32 cotangents with operands in `dtype`, which runs at the speed of
    float32, and would round the gradients of float32 parameters to `dtype`.

    Args:
      a: [., .] float.
      b: [., .] float.
      i: the contracted axis of `a`.
      j: the contracted axis of `b`.
      dtype: compute dtype.

    Returns:
      [free axis of a, free axis of b], at least float32.
    """
    return _low_forward(a, b, i, j, dtype)[0]


def _low_forward(a, b, i, j, dtype):
    low = a.astype(dtype), b.astype(dtype)
    # Arrays without elements carry the dtypes of the operands to the backward pass.
    like = jnp.zeros((0,), a.dtype), jnp.zeros((0,), b.dtype)
    return _dot(*low, i, j, jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)), (low, like)


def _low_backward(i, j, dtype, residuals, g):
    (a, b), like = residuals
    low, total = g.astype(dtype), g.dtype
    # The order of the operands is chosen so that the result needs no transposition.
    d_a = _dot(low, b, 1, 1 - j, total) if i else _dot(b, low, 1 - j, 1, total)
    d_b = _dot(low, a, 0, 1 - i, total) if j else _dot(a, low, 1 - i, 0, total)
    return d_a.astype(like[0].dtype), d_b.astype(like[1].dtype)


low_product.defvjp(_low_forward, _low_backward)


class Affine(nn.Module):
    """A linear layer with bias whose parameters can also be read as arrays.

    Attributes:
      in_features: input width.
      features: output width.
      initializer: one of `INITIALIZERS`.
      dtype: compute dtype of the operands; parameters and sums stay float32.
      use_bias: False for a layer without the "bias" parameter; it is then read as zeros.
    """

    in_features: int
    features: int
    initializer: str = LECUN_NORMAL
    dtype: jnp.dtype | None = None
    use_bias: bool = True

    def setup(self) -> None:
        """Declares the layers."""
        kernel_init, bias_init = initializers(self.initializer, self.in_features)
        self.kernel = self.param("kernel", kernel_init, (self.in_features, self.features))
        zeros = jnp.zeros((self.features,), self.kernel.dtype)
        self.bias = self.param("bias", bias_init, (self.features,)) if self.use_bias else zeros

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_features] to [..., features], see `affine`."""
        return affine(self.weights(), x, self.dtype)

    def weights(self) -> AffineParams:
        """The parameters as stored."""
        return {"kernel": self.kernel, "bias": self.bias}

    def columns(self) -> ColumnParams:
        """The parameters for pure functions that run inside a chunk loop.

        Transposed once, outside the loop: with the stored layout, XLA on CPU transposes kernel and weight gradient in
        every chunk, which halves the speed of a step.
        """
        return {"kernel_t": self.kernel.T, "bias": self.bias}
