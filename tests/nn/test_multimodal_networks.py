"""MCAT, PORPOISE MMF and SurvPath on packed bags: checks B2 and B4, packing, padding, single patches, empty slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import survival_golden as sg
from multimodal_setup import NETS, assert_same, bags, genes, parameters, run


@pytest.fixture(scope="module", params=sorted(NETS))
def case(request):
    net = NETS[request.param]
    return net, parameters(net)


def test_packed_equals_one_bag_at_a_time(case):
    net, params = case
    molecular = genes(5)
    packed = run(net, params, sg.pack(bags(), empty=1), molecular)
    assert all(np.all(np.isfinite(v)) for v in packed.values())
    for i, x in enumerate(bags()):
        alone = run(net, params, sg.one_bag(jnp.asarray(x), row=8), {"genes": molecular["genes"][i : i + 1]})
        assert_same(alone, {k: v[i : i + 1] for k, v in packed.items()})


def test_B2_order_of_patches_and_place_in_the_step_are_irrelevant(case):
    net, params = case
    molecular, seed = genes(4), jnp.uint32(5)
    base, noisy = (run(net, params, sg.pack(bags()), molecular, s) for s in (None, seed))
    other = sg.pack(bags(), row=16, order=np.random.default_rng(0).permutation)
    assert_same(run(net, params, other, molecular), base)
    assert_same(run(net, params, other, molecular, seed), noisy)
    assert np.abs(noisy["logits"] - base["logits"]).max() > 1e-3
    assert_same(run(net, params, sg.pack([b[::-1] for b in bags()]), molecular), base)


def test_gradients_ignore_nan_padding_and_empty_slots(case):
    net, params = case
    packed, molecular = sg.pack(bags(), empty=1), genes(5)

    def loss(params, patches):
        out = net.apply({"params": params}, packed._replace(patches=patches), molecular, jnp.uint32(0))
        return jnp.sum(out["logits"][:4] ** 2)

    grads, d_patches = jax.jit(jax.grad(loss, (0, 1)))(params, packed.patches)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(d_patches[packed.segment_ids == 0], 0.0)
    assert np.abs(d_patches[packed.segment_ids > 0]).max() > 0


def test_B4_attention_map_sums_to_one(case):
    net, params = case
    packed = sg.pack(bags())
    weights = run(net, params, packed, genes(4), method="attention_map")
    assert weights.shape == packed.segment_ids.shape
    np.testing.assert_array_equal(weights[packed.segment_ids == 0], 0.0)
    for slot in range(1, 5):
        np.testing.assert_allclose(weights[packed.segment_ids == slot].sum(), 1.0, rtol=1e-5)
