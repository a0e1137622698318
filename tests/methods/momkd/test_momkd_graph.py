"""The graph encoder against NumPy; checks 10 to 12: permutation, padding, no edges, directions."""

import jax
import jax.numpy as jnp
import momkd_setup as setup
import numpy as np
import pytest

from histokd_jax.methods.momkd.graph import DIRECTIONS, GraphAttention, make_edges


def params_of(run, seed=0):
    """Random parameters whose biases are not zero, and codes that are not unit vectors."""
    params, extra = setup.init(run, seed)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda p: p + np.asarray(0.1 * rng.normal(size=p.shape), np.float32), params)
    noisy["SLIDE"]["log_tau"] = params["SLIDE"]["log_tau"]
    return noisy, extra


def as_numpy(tree):
    return jax.tree.map(lambda p: np.asarray(p, np.float64), tree)


def small_lists(lists, k):
    """Batch fields of one slide of which each patch lists some others."""
    n = len(lists)
    offsets = np.zeros((1, n, k), np.int32)
    for c, listed in enumerate(lists):
        offsets[0, c, : len(listed)] = np.array(listed, int) - c
    ids = np.ones((1, n), np.int32)
    return jnp.asarray(offsets), jnp.asarray(ids), jnp.arange(n, dtype=jnp.int32)[None]


def pairs(edges):
    valid = np.asarray(edges.valid)
    found = list(zip(np.asarray(edges.source)[valid].tolist(), np.asarray(edges.target)[valid].tolist()))
    assert len(found) == len(set(found)), "an edge is there once"
    return set(found)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_slide_branch_equals_numpy_for_every_slide(direction):
    """Patches of several slides in rows that cut slides; one slide is too small for a graph."""
    run = setup.small_run(graph__direction=direction)
    params, extra = params_of(run)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), params)
        details = setup.details(run, params, extra, setup.batch())
    p, codes = as_numpy(params["SLIDE"]), np.asarray(params["MEMORY"]["codes"])
    start = 0
    for slot, (x, coords) in enumerate(setup.bags()):
        edges = setup.listed_edges(coords, direction=direction)
        assert bool(edges) == (len(x) > setup.K)
        tau = float(np.exp(p["log_tau"]))
        logits, weight, f, q = setup.reference_slide(p, codes, x.astype(np.float64), edges, tau)
        at = slice(start, start + len(x))
        np.testing.assert_allclose(details["patches"].features[at], f, atol=1e-10)
        np.testing.assert_allclose(details["patches"].sphere[at], q, atol=1e-10)
        np.testing.assert_allclose(details["patches"].attention[at], weight, atol=1e-10)
        np.testing.assert_allclose(details["logits"][slot], logits, atol=1e-10)
        start += len(x)
    np.testing.assert_array_equal(details["patches"].attention[start:], 0)


def test_C10_padding_with_arbitrary_content_changes_nothing():
    run = setup.small_run()
    params, extra = params_of(run)

    def everything(params, batch):
        def loss(params):
            out, _ = run.forward(params, {}, extra, batch, jax.random.key(3), True)
            return run.objective(out, batch)[0], out

        return jax.value_and_grad(loss, has_aux=True)(params)

    step = jax.jit(everything)
    (clean, out), grads = step(params, setup.batch())
    (noisy, noisy_out), noisy_grads = step(params, setup.batch(noise=5))
    assert np.isfinite(clean) and clean == noisy
    jax.tree.map(np.testing.assert_array_equal, (out, grads), (noisy_out, noisy_grads))
    weights = setup.attention(run, params, extra, setup.batch(noise=5))
    segments = setup.batch()["segment_ids"]
    sums = [weights[segments == slot + 1].sum() for slot in range(len(setup.SIZES))]
    np.testing.assert_allclose(sums, 1.0, rtol=1e-6)
    assert weights.shape == segments.shape and not weights[segments == 0].any()


def test_C10_joint_permutation_of_patches_and_edges_permutes_attention_only():
    run = setup.small_run()
    params, extra = params_of(run)
    found, rng = setup.bags(), np.random.default_rng(1)
    orders = [rng.permutation(len(x)) for x, _ in found]
    turned = [(x[order], coords[order]) for (x, coords), order in zip(found, orders)]
    fields = setup.slot_fields(len(found))
    a, b = (setup.details(run, params, extra, setup.packed(bags) | fields) for bags in (found, turned))
    for name in ("logits", "slide", "commit", "gap_slide"):
        np.testing.assert_allclose(a[name], b[name], atol=1e-5)
    start = 0
    for order in orders:
        at = slice(start, start + len(order))
        np.testing.assert_allclose(a["patches"].attention[at][order], b["patches"].attention[at], atol=1e-6)
        start += len(order)


def test_packing_and_slides_of_a_step_do_not_matter():
    """A slide alone, in other rows, gives what it gives among others."""
    run = setup.small_run()
    params, extra = params_of(run)
    together = setup.details(run, params, extra, setup.batch())
    fields = setup.slot_fields(len(setup.SIZES))
    for slot, bag in enumerate(setup.bags()):
        own = {name: value[slot : slot + 1] for name, value in fields.items()}
        alone = setup.details(run, params, extra, setup.packed([bag], row=5) | own)
        for name in ("logits", "slide", "gene", "reconstruction", "commit", "orth", "gap_slide", "gap_gene"):
            np.testing.assert_allclose(alone[name][0], together[name][slot], atol=1e-5, err_msg=name)


def test_C11_without_edges_every_patch_attends_to_itself_only():
    run = setup.small_run()
    params, extra = params_of(run)
    batch = setup.batch() | {"neighbours": np.zeros_like(setup.batch()["neighbours"])}
    details = setup.details(run, params, extra, batch)
    real = batch["segment_ids"].reshape(-1) > 0
    x = batch["patches"].reshape(-1, setup.FEAT)
    gat = as_numpy(params["SLIDE"]["gat_1"])
    np.testing.assert_allclose(
        details["patches"].first[real], (setup.linear(gat["source"], x) + gat["bias"])[real], atol=1e-5
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(details))
    small = setup.details(run, params, extra, setup.packed([setup.bags()[3]]) | setup.slot_fields(1))
    assert np.isfinite(small["logits"]).all()


def test_C12_directions_differ_on_a_path_and_symmetric_has_none():
    lists = [[1], [2], [1]]  # patch 0 lists 1, 1 lists 2, 2 lists 1
    reverse = [[], [0, 2], [1]]
    edges = {d: make_edges(*small_lists(lists, 2), d) for d in DIRECTIONS}
    assert pairs(edges["centre_to_neighbour"]) == {(0, 1), (1, 2), (2, 1)}
    assert pairs(edges["neighbour_to_centre"]) == {(1, 0), (2, 1), (1, 2)}
    assert pairs(edges["symmetric"]) == {(0, 1), (1, 0), (1, 2), (2, 1)}
    assert pairs(make_edges(*small_lists(reverse, 2), "symmetric")) == pairs(edges["symmetric"])
    layer = GraphAttention(4, 6, 2, 0.0, 0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    params = layer.init(jax.random.key(0), x, edges["symmetric"])
    out = {d: layer.apply(params, x, e) for d, e in edges.items()}
    assert not np.allclose(out["centre_to_neighbour"], out["neighbour_to_centre"], atol=1e-3)
    again = layer.apply(params, x, make_edges(*small_lists(reverse, 2), "symmetric"))
    np.testing.assert_allclose(out["symmetric"], again, atol=1e-6)
    with pytest.raises(ValueError, match="graph.direction = 'both' is unknown"):
        make_edges(*small_lists(lists, 2), "both")


def test_attention_dropout_keeps_the_mean_and_does_not_depend_on_packing():
    layer = GraphAttention(setup.FEAT, 8, 2, 0.5, 0)
    found = setup.bags()

    def run(batch, params=None, seed=None):
        edges = make_edges(*(jnp.asarray(batch[n]) for n in ("neighbours", "segment_ids", "positions")), "symmetric")
        x = jnp.asarray(batch["patches"]).reshape(-1, setup.FEAT)
        if params is None:
            return layer.init(jax.random.key(0), x, edges)
        return layer.apply(params, x, edges, seed)

    batch = setup.packed(found)
    params = run(batch)
    seed = jnp.uint32(7)
    once, real = run(batch, params, seed), batch["segment_ids"].reshape(-1) > 0
    other = setup.packed(found, row=31)
    np.testing.assert_allclose(once[real], run(other, params, seed)[other["segment_ids"].reshape(-1) > 0], atol=1e-6)
    draws = jnp.mean(jax.jit(jax.vmap(lambda s: run(batch, params, s)))(jnp.arange(300, dtype=jnp.uint32)), axis=0)
    assert np.abs(once - run(batch, params))[real].max() > 0.1
    np.testing.assert_allclose(draws[real], run(batch, params)[real], atol=0.25)


def test_patches_of_another_width_are_refused():
    run = setup.small_run()
    params, extra = setup.init(run)
    found = setup.bags(width=5)
    with pytest.raises(ValueError, match="5 wide.*data.feat_dim"):
        setup.details(run, params, extra, setup.packed(found) | setup.slot_fields(len(found)))
