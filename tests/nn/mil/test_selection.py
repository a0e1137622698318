"""The selection of extreme patches against a sort in NumPy: ragged bags, ties, padding, gradients, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.selection import HIGHEST, LOWEST, select
from histokd_jax.utils import hlo

D, Q, B = 3, 2, 4
SIZES = (9, 1, 0, 30, 5)


def scores(params, aux, x, seg, pos):
    del aux, seg, pos
    return x.T, params @ x.T


def make(rows=4, length=16, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    x = np.full((rows * length, D), np.nan, np.float32)
    ids, positions = np.zeros(rows * length, np.int32), np.zeros(rows * length, np.int32)
    # Padding in front as well: a place without a winner must not show it.
    held = slice(2, 2 + total)
    x[held] = rng.normal(size=(total, D))
    ids[held] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    positions[held] = np.concatenate([np.arange(n) for n in sizes])
    shape = (rows, length)
    bags = Bags(x.reshape(*shape, D), ids.reshape(shape), positions.reshape(shape), len(sizes))
    return rng.normal(size=(Q, D)).astype(np.float32), bags


def expected(params, bags, slot, query, end):
    """Positions and patches of one slide, best first; equal scores by position."""
    x = np.asarray(bags.patches).reshape(-1, D)[np.asarray(bags.segment_ids).reshape(-1) == slot + 1]
    order = np.lexsort((np.arange(len(x)), -end * (x.astype(np.float64) @ params[query].astype(np.float64))))[:B]
    return order, x[order]


@pytest.mark.parametrize("chunk", [1, 7, 16, 1000])
def test_selects_what_a_sort_selects(chunk):
    params, bags = make()
    chosen = jax.jit(lambda p: select(scores, p, (), bags, B, chunk=chunk))(params)
    for e, end in enumerate((HIGHEST, LOWEST)):
        for s, size in enumerate(SIZES):
            for q in range(Q):
                positions, patches = expected(params, bags, s, q, end)
                held = np.asarray(chosen.valid[e, s, q])
                np.testing.assert_array_equal(held, np.arange(B) < size)
                np.testing.assert_array_equal(chosen.positions[e, s, q][held], positions)
                np.testing.assert_array_equal(chosen.patches[e, s, q][held], patches)
                assert np.all(np.asarray(chosen.patches[e, s, q])[~held] == 0)


def test_ties_go_to_the_first_patch_of_the_bag():
    params, bags = make()
    same = np.where(np.isnan(bags.patches), np.nan, 1.0).astype(np.float32)
    chosen = select(scores, params, (), bags._replace(patches=same), B, ends=(HIGHEST,), chunk=4)
    np.testing.assert_array_equal(chosen.positions[0, 3], [np.arange(B)] * Q)


def test_identity_names_slot_and_position_of_every_chosen_patch():
    params, bags = make()
    x, ids, positions = select(scores, params, (), bags, B).identity()
    flat = {
        (s, p): row
        for s, p, row in zip(
            np.ravel(bags.segment_ids), np.ravel(bags.positions), np.asarray(bags.patches).reshape(-1, D)
        )
    }
    for row, s, p in zip(np.asarray(x), np.asarray(ids), np.asarray(positions)):
        np.testing.assert_array_equal(row, flat[s, p] if s else np.zeros(D))


def test_chosen_patches_have_gradients_and_the_choice_has_none():
    params, bags = make()
    weight = np.random.default_rng(4).normal(size=(2, len(SIZES), Q, B, D)).astype(np.float32)

    def loss(params, patches):
        return jnp.sum(select(scores, params, (), bags._replace(patches=patches), B).patches * weight)

    d_params, d_patches = jax.grad(loss, (0, 1))(params, bags.patches)
    np.testing.assert_array_equal(d_params, 0.0)
    want = np.zeros_like(bags.patches).reshape(-1, D)
    ids = np.ravel(bags.segment_ids)
    for e, end in enumerate((HIGHEST, LOWEST)):
        for s in range(len(SIZES)):
            for q in range(Q):
                order, _ = expected(params, bags, s, q, end)
                want[np.flatnonzero(ids == s + 1)[order]] += weight[e, s, q, : len(order)]
    np.testing.assert_allclose(np.asarray(d_patches).reshape(-1, D), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data,sequence", [(4, 1), (2, 2), (1, 8)])
def test_a_mesh_selects_the_same_with_all_reduces_only(data, sequence):
    params, bags = make()
    clean = bags._replace(patches=np.nan_to_num(bags.patches, nan=3.0))
    weight = np.random.default_rng(4).normal(size=(2, len(SIZES), Q, B, D)).astype(np.float32)
    mesh = jax.make_mesh((data, sequence), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(params, patches, ids, positions):
        def loss(patches):
            chosen = select(scores, params, (), Bags(patches, ids, positions, len(SIZES)), B, chunk=5)
            return jnp.sum(chosen.patches * weight), chosen

        return jax.grad(loss, has_aux=True)(patches)

    arrays = clean[:3]
    want_grad, want = jax.jit(run)(params, *arrays)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data", "sequence"))
        placed = [jax.device_put(a, sharding) for a in arrays]
        compiled = jax.jit(run).lower(params, *placed).compile()
        grad, chosen = compiled(params, *placed)
        assert set(hlo.collective_bytes(compiled.as_text())) == {"all-reduce"}
    for a, b in zip(chosen, want):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(grad, want_grad, rtol=1e-6)


def test_nothing_to_select_is_refused():
    params, bags = make()
    with pytest.raises(ValueError, match="count = 0"):
        select(scores, params, (), bags, 0)
