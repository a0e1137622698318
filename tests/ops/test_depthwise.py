"""The depth-wise kernel against a plain loop and against the framework's grouped convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops.depthwise import GROUPED, SHIFTS, depthwise


def reference(x, kernel):
    k, pad = kernel.shape[0], kernel.shape[0] // 2
    padded = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    y = np.zeros_like(x)
    for row in range(x.shape[1]):
        for column in range(x.shape[2]):
            window = padded[:, row : row + k, column : column + k]
            y[:, row, column] = (window * kernel[None, :, :, 0]).sum((1, 2))
    return y


def numbers(side, shape=(2, 5, 4, 3), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=(side, side, 1, shape[-1]))


@pytest.mark.parametrize("form", [SHIFTS, GROUPED])
@pytest.mark.parametrize("side", [1, 3, 5, 7])
def test_equals_a_plain_loop(side, form):
    x, kernel = numbers(side)
    with jax.enable_x64(True):
        found = jax.jit(depthwise, static_argnums=2)(jnp.asarray(x), jnp.asarray(kernel), form)
        np.testing.assert_allclose(found, reference(x, kernel), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side,shape", [(3, (2, 5, 4, 3)), (7, (2, 5, 4, 3)), (7, (1, 1, 1, 2)), (5, (2, 3, 8, 1))])
def test_gradients_equal_those_of_the_grouped_convolution(side, shape):
    x, kernel = numbers(side, shape)
    weight = np.random.default_rng(1).normal(size=shape)
    with jax.enable_x64(True):

        def total(x, kernel, form):
            return jnp.sum(depthwise(x, kernel, form) * weight)

        ours, theirs = (jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(kernel), f) for f in (SHIFTS, GROUPED))
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11)


def test_half_precision_keeps_its_type_and_sums_weight_gradients_in_float32():
    x, kernel = (jnp.asarray(v, jnp.bfloat16) for v in numbers(3, (8, 16, 16, 2)))
    y, pull = jax.vjp(depthwise, x, kernel)
    d_x, d_kernel = pull(jnp.ones_like(y))
    assert y.dtype == d_x.dtype == d_kernel.dtype == jnp.bfloat16
    centre = np.asarray(x, np.float32).sum((0, 1, 2))
    np.testing.assert_allclose(np.asarray(d_kernel, np.float32)[1, 1, 0], centre, rtol=1e-2, atol=0.1)


@pytest.mark.parametrize("shape", [(2, 2, 1, 3), (3, 1, 1, 3), (3, 3, 1, 4), (3, 3, 3, 3)])
def test_other_kernels_are_refused_with_both_shapes(shape):
    with pytest.raises(ValueError, match=r"kernel \(.* does not fit input \(2, 5, 4, 3\)"):
        depthwise(jnp.zeros((2, 5, 4, 3)), jnp.zeros(shape))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form = 'fast' is unknown"):
        depthwise(jnp.zeros((1, 2, 2, 1)), jnp.zeros((3, 3, 1, 1)), "fast")
