"""Co-attention (queries of each slide against keys of its patches) through the same pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.ops import pooling
from histokd_jax.utils import hlo

D, H, K, Q, SLOTS = 6, 5, 3, 4, 5
both = pytest.mark.parametrize("impl", pooling.IMPLS)


def features(params, aux, x, seg, pos):
    del aux, seg, pos
    h = jnp.maximum(params["f"].astype(x.dtype) @ x.T, 0)
    return h, params["k"].astype(x.dtype) @ x.T


def make(sizes=(27, 1, 0, 60), rows=2, length=64, seed=0):
    rng = np.random.default_rng(seed)
    params = {"f": rng.normal(size=(H, D)), "k": rng.normal(size=(K, D))}
    seg = np.zeros(rows * length, np.int32)
    seg[: sum(sizes)] = np.repeat(np.arange(len(sizes)) + 1, sizes)
    x = np.where((seg > 0)[:, None], rng.normal(size=(len(seg), D)), np.nan)
    queries = rng.normal(size=(SLOTS, Q, K))
    return params, queries, x.reshape(rows, length, D), seg.reshape(rows, length)


def f32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32 if a.dtype == np.float64 else a.dtype), tree)


def pool(params, queries, x, seg, impl="chunked", chunk=16):
    return pooling.attention_pool(
        features, params, (), x, seg, jnp.zeros_like(seg), num_slots=SLOTS, queries=queries, chunk=chunk, impl=impl
    )


def reference(params, queries, x, seg):
    """Bag by bag, float64: pooled [S, Q, H], weights [Q, N], and the gradients of sum(pooled ** 2)."""
    x, seg = x.reshape(-1, D), seg.reshape(-1)
    pooled, weights = np.zeros((SLOTS, Q, H)), np.zeros((Q, len(x)))
    grads = {"f": np.zeros((H, D)), "k": np.zeros((K, D)), "queries": np.zeros((SLOTS, Q, K))}
    for s in range(SLOTS):
        bag = x[seg == s + 1]
        if not len(bag):
            continue
        u, keys = bag @ params["f"].T, bag @ params["k"].T
        h = np.maximum(u, 0)
        scores = queries[s] @ keys.T
        a = np.exp(scores - scores.max(1, keepdims=True))
        a /= a.sum(1, keepdims=True)
        pooled[s], weights[:, seg == s + 1] = a @ h, a
        g = 2 * pooled[s]
        d_a = g @ h.T
        d_s = a * (d_a - (a * d_a).sum(1, keepdims=True))
        grads["f"] += ((a.T @ g) * (u > 0)).T @ bag
        grads["k"] += (d_s.T @ queries[s]).T @ bag
        grads["queries"][s] = d_s @ keys
    return pooled, weights, grads


@both
def test_value_weights_and_gradients_equal_the_bag_by_bag_reference(impl):
    params, queries, x, seg = make()
    want, weights, grads = reference(params, queries, x, seg)
    args = f32((params, queries, x, seg))
    pooled, lse = pool(*args, impl)
    np.testing.assert_allclose(pooled, want, atol=5e-6)
    empty = [2, 4]
    assert np.all(np.asarray(pooled)[empty] == 0) and np.all(np.asarray(lse)[empty] == pooling.NEG)
    found = pooling.attention_weights(
        features, args[0], (), args[2], args[3], jnp.zeros_like(args[3]), num_slots=SLOTS, queries=args[1], chunk=16
    )
    np.testing.assert_allclose(np.asarray(found).reshape(Q, -1), weights, atol=5e-6)
    by_params, by_queries = jax.grad(lambda p, q: jnp.sum(pool(p, q, *args[2:], impl)[0] ** 2), argnums=(0, 1))(
        *args[:2]
    )
    scale = max(np.abs(g).max() for g in grads.values())
    for name in ("f", "k"):
        np.testing.assert_allclose(by_params[name], grads[name], atol=2e-6 * scale)
    np.testing.assert_allclose(by_queries, grads["queries"], atol=2e-6 * scale)


def test_gradient_of_patches_and_normaliser_agree_between_implementations():
    params, queries, x, seg = f32(make())

    def value(impl):
        def of(queries, x):
            pooled, lse = pool(params, queries, x, seg, impl)
            return jnp.sum(pooled**2) + jnp.sum(jnp.where(lse > pooling.NEG / 2, lse, 0) ** 2)

        return jax.grad(of, argnums=(0, 1))(queries, x)

    chunked, segment = value("chunked"), value("segment")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), chunked, segment)
    assert np.all(np.asarray(chunked[1])[np.asarray(seg) == 0] == 0)


@both
@pytest.mark.parametrize(("data", "sequence"), [(2, 1), (2, 4)])
def test_sharded_equals_one_device(impl, data, sequence):
    params, queries, x, seg = f32(make())
    value = jax.value_and_grad(lambda p, q, x: jnp.sum(pool(p, q, x, seg, impl)[0] ** 2), argnums=(0, 1))
    want = value(params, queries, x)
    mesh = jax.make_mesh((data, sequence), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data", "sequence")))
        step = jax.jit(value)
        got = step(params, queries, placed)
        sent = hlo.collective_bytes(step.lower(params, queries, placed).compile().as_text())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), got, want)
    small = sum(p.nbytes for p in params.values()) + queries.nbytes + 4 * SLOTS * Q * (H + 2)
    assert set(sent) == {"all-reduce"} and sent["all-reduce"] <= small


@both
def test_bfloat16_is_finite_and_close(impl):
    params, queries, x, seg = f32(make())
    queries = 0.3 * queries  # a softmax so sharp that it rests on one patch would show the rounding of its score

    def grads(dtype):
        return jax.grad(lambda p, q: jnp.sum(pool(p, q, x.astype(dtype), seg, impl)[0] ** 2), argnums=(0, 1))(
            params, queries
        )

    low, full = grads(jnp.bfloat16), grads(jnp.float32)
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(full)):
        assert a.dtype == jnp.float32 and np.isfinite(a).all()
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_memory_does_not_grow_with_the_bag():
    def temporaries(length):
        params = {"f": jax.ShapeDtypeStruct((H, 64), jnp.float32), "k": jax.ShapeDtypeStruct((K, 64), jnp.float32)}
        queries = jax.ShapeDtypeStruct((SLOTS, Q, K), jnp.float32)
        x, seg = jax.ShapeDtypeStruct((1, length, 64), jnp.float16), jax.ShapeDtypeStruct((1, length), jnp.int32)

        def value(params, queries, x, seg):
            cast = lambda p, a, x, s, n: features(p, a, x.astype(jnp.float32), s, n)  # noqa: E731
            pooled, _ = pooling.attention_pool(
                cast, params, (), x, seg, seg, num_slots=SLOTS, queries=queries, chunk=1000
            )
            return jnp.sum(pooled)

        compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(params, queries, x, seg).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(200_000) < temporaries(20_000) + 1_000_000


@pytest.mark.parametrize("shape", [(SLOTS + 1, Q, K), (SLOTS, Q, K + 1), (SLOTS, K)])
def test_queries_that_do_not_fit_are_refused(shape):
    params, _, x, seg = f32(make())
    with pytest.raises(ValueError, match=r"queries .* S = 5 slots and K = 3"):
        pool(params, jnp.zeros(shape), x, seg)
