"""Co-attention module against textbook attention with explicit keys and values, bag by bag in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.nn.coattention import CoAttention, ProjectedPatches
from histokd_jax.nn.gated_attention import Bags

D, E, H, Q, SLOTS = 7, 6, 5, 3, 4
SIZES = (9, 0, 20)


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    seg = np.zeros(32, np.int32)
    seg[: sum(SIZES)] = np.repeat(np.arange(len(SIZES)) + 1, SIZES)
    x = np.where((seg > 0)[:, None], rng.normal(size=(32, D)), np.nan)
    pos = np.arange(32, dtype=np.int32)
    bags = Bags(jnp.asarray(x.reshape(2, 16, D), dtype), *(jnp.asarray(t.reshape(2, 16)) for t in (seg, pos)), SLOTS)
    return bags, jnp.asarray(rng.normal(size=(SLOTS, Q, E)), jnp.float32)


def build(use_bias=True, **features):
    net = CoAttention(D, E, H, ProjectedPatches(**features), use_bias, "torch_default", chunk=8)
    params = net.init(jax.random.key(0), *inputs())["params"]
    # Biases away from 0, so that one that is lost or doubled shows.
    return net, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def textbook(params, bags, tokens):
    """softmax(query key' / sqrt(H)) value per slide, then the output layer; and the weights [Q, R, L]."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def layer(name, x):
        return x @ p[name]["kernel"] + p[name].get("bias", 0.0)

    x, seg = np.asarray(bags.patches, np.float64).reshape(-1, D), np.asarray(bags.segment_ids).reshape(-1)
    out, weights = np.zeros((SLOTS, Q, H)), np.zeros((Q, len(x)))
    for s in range(SLOTS):
        bag = x[seg == s + 1]
        if len(bag):
            h = np.maximum(layer("proj", bag), 0)
            scores = layer("query", np.asarray(tokens[s], np.float64)) @ layer("key", h).T / np.sqrt(H)
            a = np.exp(scores - scores.max(1, keepdims=True))
            weights[:, seg == s + 1] = a = a / a.sum(1, keepdims=True)
            out[s] = layer("out", a @ layer("value", h))
    return out, weights.reshape(Q, *bags.segment_ids.shape)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("impl", ["chunked", "segment"])
def test_equals_attention_with_explicit_keys_and_values(use_bias, impl):
    net, params = build(use_bias)
    net = net.clone(impl=impl)
    assert ("bias" in params["key"]) == ("bias" in params["out"]) == use_bias
    bags, tokens = inputs()
    out, weights = textbook(params, bags, tokens)
    np.testing.assert_allclose(net.apply({"params": params}, bags, tokens), out, atol=2e-6)
    found = net.apply({"params": params}, bags, tokens, method="attention_map")
    np.testing.assert_allclose(found, weights, atol=2e-6)


def test_gradients_reach_tokens_and_parameters_but_not_the_key_bias():
    net, params = build()
    bags, tokens = inputs()
    by_params, by_tokens = jax.grad(lambda p, t: jnp.sum(net.apply({"params": p}, bags, t) ** 2), argnums=(0, 1))(
        params, tokens
    )
    for name, layer in by_params.items():
        for kind, grad in layer.items():
            assert np.isfinite(grad).all()
            assert bool(jnp.any(grad != 0)) == ((name, kind) != ("key", "bias")), (name, kind)
    filled = np.asarray(SIZES) > 0
    moved = np.any(np.asarray(by_tokens) != 0, axis=(1, 2))
    np.testing.assert_array_equal(moved, [*filled, False])


def test_finite_differences_of_a_token():
    net, params = build()
    bags, tokens = inputs()

    def value(t):
        return float(jnp.sum(net.apply({"params": params}, bags, t) ** 2))

    grad = jax.grad(lambda t: jnp.sum(net.apply({"params": params}, bags, t) ** 2))(tokens)
    step = 1e-2
    for at in [(0, 0, 0), (2, 1, 3)]:
        one = jnp.zeros_like(tokens).at[at].set(step)
        np.testing.assert_allclose(
            grad[at], (value(tokens + one) - value(tokens - one)) / (2 * step), rtol=0.05, atol=2e-3
        )


def test_bfloat16_is_close_and_dropout_changes_the_result():
    net, params = build()
    bags, tokens = inputs()
    full = net.apply({"params": params}, bags, tokens)
    low = net.clone(features=ProjectedPatches(dtype=jnp.bfloat16)).apply({"params": params}, bags, tokens)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, full, atol=0.03 * float(jnp.max(jnp.abs(full))))
    noisy = net.clone(features=ProjectedPatches(rate=0.5)).apply({"params": params}, bags, tokens, jnp.uint32(1))
    assert not np.allclose(noisy, full)


def test_inputs_of_another_shape_are_refused():
    net, params = build()
    bags, tokens = inputs()
    with pytest.raises(ValueError, match="S = 4 slots and E = token_dim = 6"):
        net.apply({"params": params}, bags, tokens[:, :, :4])
    with pytest.raises(ValueError, match="built for data.feat_dim = 7"):
        net.apply({"params": params}, bags._replace(patches=bags.patches[..., :5]), tokens)
