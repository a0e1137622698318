"""Blocks of the attention plane against the whole plane: values, gradients, moments, memory, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from paired_setup import once

from histokd_jax.ops import token_attention as ops

B, N, E, C = 3, 10, 4, 5


def numbers(shared=False, tokens=N, batch=B, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    plane = ops.Plane(draw(3, 3, E, E), draw(E), 0.1 * draw(E), draw(E), draw(3, 3, E, 1))
    return draw(batch, tokens, 1 if shared else E, C), draw(batch, tokens, E, C), draw(batch, tokens, C), plane


def whole(q, k, v, plane, gate=ops.GATED):
    return ops.attend(ops.mixed_scores(q, k, plane.mix), v, plane, gate)


@pytest.mark.parametrize("gate", ops.GATES)
@pytest.mark.parametrize("rows,shared", [(1, False), (4, True), (5, False), (9, True)])
def test_blocks_equal_the_whole_plane(rows, shared, gate):
    with jax.enable_x64(True):
        q, k, v, plane = numbers(shared)
        out, found = once(lambda *a: whole(*a, gate), q, k, v, plane)
        in_blocks = once(lambda *a: ops.attend_in_blocks(*a, rows, gate), q, k, v, plane)
        for a, b in zip(in_blocks, (out, found)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
        values, no_map = once(lambda *a: ops.attend_in_blocks(*a, rows, gate, want_map=False), q, k, v, plane)
        assert no_map is None
        np.testing.assert_allclose(values, out, rtol=0, atol=1e-12)


def test_gradients_of_blocks_equal_those_of_the_whole_plane():
    with jax.enable_x64(True):
        args = numbers()
        weight = np.random.default_rng(3).normal(size=(B, N, N))

        def total(pair):
            out, found = pair
            return jnp.sum(jnp.sin(out)) + jnp.sum(found * weight)

        ours = once(jax.grad(lambda args: total(ops.attend_in_blocks(*args, rows=3))), args)
        theirs = once(jax.grad(lambda args: total(whole(*args))), args)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shared", [False, True])
def test_moments_without_the_plane_equal_its_moments_in_value_and_gradient(shared):
    with jax.enable_x64(True):
        q, k, _, plane = numbers(shared)

        def direct(q, k, mix):
            return ops.moments(ops.mixed_scores(q, k, mix))

        for a, b in zip(once(ops.plane_moments, q, k, plane.mix), once(direct, q, k, plane.mix)):
            np.testing.assert_allclose(a, b, rtol=1e-11)
        ours, theirs = (
            once(
                jax.grad(lambda q, k, mix, f=f: jnp.sum(f(q, k, mix)[0] + jnp.sin(f(q, k, mix)[1])), (0, 1, 2)),
                *(q, k, plane.mix),
            )
            for f in (ops.plane_moments, direct)
        )
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_moments_keep_their_digits_where_the_mean_is_large():
    """E[x^2] - E[x]^2 would lose all of them in float32."""
    q, k, _, plane = numbers(dtype=np.float32)
    mean, var = once(ops.plane_moments, q + 300.0, k + 300.0, plane.mix)
    with jax.enable_x64(True):
        args = (np.asarray(v, np.float64) for v in (q + 300.0, k + 300.0, plane.mix))
        exact = once(lambda *a: ops.moments(ops.mixed_scores(*a)), *map(jnp.asarray, args))
    np.testing.assert_allclose(mean, exact[0], rtol=1e-4)
    np.testing.assert_allclose(var, exact[1], rtol=1e-3)


def test_half_precision_operands_give_float32_scores_and_maps():
    q, k, v, plane = numbers(dtype=np.float32)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out, found = once(lambda *a: ops.attend_in_blocks(*a, rows=5), *low, plane)
    assert out.dtype == jnp.bfloat16 and found.dtype == jnp.float32
    exact = once(whole, *(x.astype(jnp.float32) for x in low), plane)[1]
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_a_block_holds_at_most_the_given_numbers():
    assert ops.block_rows(16, 1024, 4, 2**22) == 64
    assert ops.block_rows(16, 256, 4, 2**22) == 256
    assert ops.block_rows(1, 10, 4, 10**9) == 10
    assert ops.block_rows(64, 4096, 4, 10) == 1


def test_temporaries_do_not_grow_with_the_square_of_the_tokens():
    """8 x 512^2 x 4 floats are 32 MiB per array of the whole plane."""

    def temporaries(attend):
        q, k, v, plane = numbers(tokens=512, batch=8, dtype=np.float32)

        def total(q, k, v):
            return jnp.sum(attend(q, k, v, plane))

        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    plain = temporaries(lambda *args: whole(*args)[0])
    blocks = temporaries(lambda *args: ops.attend_in_blocks(*args, rows=16, want_map=False)[0])
    assert plain > 100 and blocks < 25


def test_a_batch_divided_over_devices_stays_divided():
    q, k, v, plane = numbers(batch=8, dtype=np.float32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
    run = jax.jit(lambda q, k, v: ops.attend_in_blocks(q, k, v, plane, rows=4)[0])
    divided = [put(x) for x in (q, k, v)]
    text = run.lower(*divided).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text
    np.testing.assert_allclose(run(*divided), run(q, k, v), rtol=1e-4, atol=1e-4)
