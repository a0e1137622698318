"""Shapes, invariances and gradient paths of G-HANet (checks C1 to C10 and C16 of the specification)."""

import functools

import ghanet_setup as setup
import jax
import numpy as np
import pytest

from histokd_jax.methods.ghanet import torch_keys
from histokd_jax.methods.ghanet.config import FAITHFUL, default_config
from histokd_jax.methods.ghanet.method import make_method, make_run

PRESETS = {"faithful": FAITHFUL, "corrected": {}}


@functools.lru_cache
def jitted(method, *static):
    """A bound method, compiled once per shape for all tests."""
    return jax.jit(method, static_argnums=static)


@pytest.fixture(scope="module")
def presets():
    """name -> (run, its parameters)."""
    runs = {name: setup.small_run(preset) for name, preset in PRESETS.items()}
    return {name: (run, jax.jit(run.init)(jax.random.key(0))[0]) for name, run in runs.items()}


@pytest.fixture(scope="module")
def run(presets):
    return presets["faithful"][0]


@pytest.fixture(scope="module")
def params(presets):
    return presets["faithful"][1]


def predict(run, params, batch):
    return jitted(run.predict, 4)(params, {}, {}, batch, "pathology")


def maps(run, params, batch):
    return jax.device_get(jitted(run.patch_weights)(params, batch))


def one(patches, layout=setup.padded, **kw):
    return layout([patches], **kw) | setup.slot_fields(1)


def assert_same(a, b, atol=1e-5):
    assert set(a) == set(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), dict(a), dict(b))


@pytest.mark.parametrize("n", [5, 9, 10, 57, 5000])
def test_C1_shapes_and_ranges(run, params, n):
    length = max(n, 10)  # One program for the small bags.
    batch = one(setup.bags((n,))[0], length=length)
    out, found = predict(run, params, batch), maps(run, params, batch)
    assert out["hazards"].shape == (1, 4) and np.all((out["hazards"] > 0) & (out["hazards"] < 1))
    assert np.all(np.diff(out["survival"][0]) <= 0)
    assert -4 < out["risk"][0] < 0
    np.testing.assert_allclose(out["risk"], -out["survival"].sum(axis=1), rtol=1e-6)
    assert found["M"].shape == found["G"].shape == (3, 1, length)


@pytest.mark.parametrize("preset", PRESETS)
def test_C2_patch_order_permutes_the_maps_only(presets, preset):
    run, params = presets[preset]
    patches, order = setup.bags((23,))[0], np.random.default_rng(3).permutation(23)
    batch, mixed = one(patches), one(patches[order])
    assert_same(predict(run, params, batch), predict(run, params, mixed))
    a, b = maps(run, params, batch), maps(run, params, mixed)
    for name in ("M", "G", "P", "Q"):
        np.testing.assert_allclose(a[name][:, :, order], b[name], atol=1e-5)


@pytest.mark.parametrize("fill", [1e6, np.nan])
def test_C3_padding_is_unobservable_and_k_counts_valid_patches(run, params, fill):
    patches = setup.bags((23,))[0]
    clean, dirty = one(patches), one(patches, length=61, fill=fill)
    assert_same(predict(run, params, clean), predict(run, params, dirty))
    found = maps(run, params, dirty)
    assert all(np.all(m[:, 0, 23:] == 0) for m in found.values())
    np.testing.assert_array_equal((found["Q"] > 0).sum(axis=-1), 4)


@pytest.mark.parametrize("pool", ["chunked", "segment"])
@pytest.mark.parametrize("preset", PRESETS)
def test_packed_rows_equal_one_bag_per_row(presets, preset, pool):
    run, params = setup.small_run(PRESETS[preset], data__pool=pool), presets[preset][1]
    assert_same(
        predict(run, params, setup.batch()), predict(run, params, setup.batch(setup.padded, length=40, fill=7.0))
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_C4_repeated_patches_leave_the_risk(presets, preset):
    run, params = presets[preset]
    patches = setup.bags((10,))[0]
    once, thrice = one(patches), one(np.concatenate([patches] * 3))
    assert_same(predict(run, params, once), predict(run, params, thrice))


def test_C5_risk_does_not_read_genes(run, params):
    batch = setup.batch()
    deployed = {name: params[name] for name in ("CAB", "HSB")}
    expected = predict(run, params, batch)
    bag_only = {k: batch[k] for k in ("patches", "segment_ids", "positions", "weight")}
    for genes in (batch["genes"], 0 * batch["genes"], batch["genes"][::-1]):
        assert_same(expected, predict(run, deployed, bag_only | {"genes": genes}), atol=0)
    assert_same(expected, predict(run, deployed, bag_only), atol=0)
    # A model directory without gene groups has no heads, and needs none.
    assert_same(expected, predict(setup.small_run(groups=()), deployed, bag_only), atol=0)


def test_C6_rows_of_the_maps(run, params):
    batch = one(setup.bags((57,))[0])
    found = maps(run, params, batch)
    np.testing.assert_allclose(found["G"].sum(axis=(1, 2)), 1.0, rtol=1e-5)
    assert found["P"].shape == (1, 1, 57), "one row of morphology weights serves every token"
    np.testing.assert_array_equal((found["Q"] > 0).sum(axis=(1, 2)), 11)
    np.testing.assert_allclose(found["G"], (found["P"] + found["Q"]) / 2, atol=1e-6)
    same = maps(run, params, one(np.repeat(setup.bags((1,))[0], 20, axis=0)))
    np.testing.assert_allclose(same["G"], 1 / 20, rtol=1e-5)


def test_map_and_weights_equal_numpy(run, params):
    """Steps 3 to 6 of HSB recomputed from M."""
    found = maps(run, params, one(setup.bags((23,))[0]))
    m = found["M"][:, 0].astype(np.float64)
    keep = m >= np.sort(m, axis=1)[:, ::-1][:, 3:4]
    e = np.where(keep, np.exp(m - m.max(axis=1, keepdims=True)), 0.0)
    np.testing.assert_allclose(found["Q"][:, 0], e / e.sum(axis=1, keepdims=True), rtol=1e-5)


def test_C7_tiny_bags_raise_in_faithful_and_work_in_corrected(presets, run, params):
    tiny = one(setup.bags((4,))[0])
    with pytest.raises(ValueError, match=r"slot 0 has 4 patches.*hsb.min_k = 1"):
        run.predict(params, {}, {}, tiny, "pathology")
    # Compiled, sizes are not known: the prediction is NaN, never a number.
    assert np.isnan(predict(run, params, tiny)["risk"][0])
    corrected, own = presets["corrected"]
    assert np.isfinite(predict(corrected, own, tiny)["risk"][0])


def value_and_gradient(run, params, batch):
    def loss(params):
        out, _ = run.forward(params, {}, {}, batch, None, False)
        return run.objective(out, batch)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def gradient(run, params, batch):
    return value_and_gradient(run, params, batch)[1]


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_C8_survival_loss_never_reaches_the_heads(params):
    grads = gradient(setup.small_run(loss__rec_weight=0.0), params, setup.batch())
    assert largest(grads["HEADS"]) == 0.0
    assert largest(grads["CAB"]["tokens"]) > 0 and largest(grads["CAB"]["proj"]) > 0


def test_C8_reconstruction_loss_never_reaches_hsb(run, params):
    batch = setup.batch()

    def loss(params):
        out, _ = run.forward(params, {}, {}, batch, None, False)
        return run.objective(out, batch)[1]["rec"][0]

    grads = jax.jit(jax.grad(loss))(params)
    assert largest(grads["HSB"]) == 0.0 and largest(grads["HEADS"]) > 0 and largest(grads["CAB"]["proj"]) > 0


@pytest.mark.parametrize("pool", [pytest.param("chunked", marks=pytest.mark.slow), "segment"])
def test_C9_the_genotype_view_is_a_constant_and_the_morphology_view_is_not(params, pool):
    batch = setup.batch()
    run = setup.small_run(loss__rec_weight=0.0, data__pool=pool)
    constant = jax.jit(lambda p: run.networks["CAB"].apply({"params": p}, setup_bags(batch))[1])(params["CAB"])

    def frozen_map(params):
        tokens, _ = run.networks["CAB"].apply({"params": params["CAB"]}, setup_bags(batch))
        out = run.networks["HSB"].apply({"params": params["HSB"]}, setup_bags(batch), tokens, constant)
        return run.objective(out, batch)[0]

    grads = gradient(run, params, batch)
    assert_same(grads["CAB"], jax.jit(jax.grad(frozen_map))(params)["CAB"], atol=1e-7)
    assert largest(grads["HSB"]["gate"]) > 0
    free = gradient(setup.small_run(loss__rec_weight=0.0, data__pool=pool, hsb__detach_map=False), params, batch)
    different = jax.tree.map(lambda a, b: np.abs(a - b).max(), free["CAB"], grads["CAB"])
    assert largest(different) > 1e-6, "without the stop-gradient the map trains CAB"


def setup_bags(batch):
    from histokd_jax.nn.gated_attention import Bags

    return Bags(*(batch[f] for f in ("patches", "segment_ids", "positions")), num_slots=batch["weight"].shape[0])


def test_C10_import_uses_99_of_104_tensors(golden_dir):
    state = setup.golden_state(golden_dir)
    used = torch_keys.to_torch(torch_keys.from_torch(state, setup.GOLDEN_GROUPS), setup.GOLDEN_GROUPS)
    assert len(state) == 104 and len(used) == 99
    assert {k for k in state if k not in used} == {k for k in state if k.startswith("recon_net.cross_attention1.")}
    for key, value in used.items():
        np.testing.assert_array_equal(value, state[key])
    assert (
        len(torch_keys.to_torch(torch_keys.from_torch(state, setup.GOLDEN_GROUPS, "own"), setup.GOLDEN_GROUPS, "own"))
        == 104
    )


def test_import_names_missing_and_unknown_tensors(golden_dir):
    state = setup.golden_state(golden_dir)
    state["extra"] = state.pop("classifier.bias")
    with pytest.raises(ValueError, match=r"missing keys \['classifier.bias'\], unknown keys \['extra'\]"):
        torch_keys.from_torch(state, setup.GOLDEN_GROUPS)


BLCA = (94, 334, 521, 468, 1495, 479)


def count(config, groups=BLCA, names=("CAB", "HEADS", "HSB")):
    method = make_method(config, setup.spec(groups, feat=1024))
    shapes = jax.eval_shape(method.init, jax.random.key(0))[0]
    return sum(int(np.prod(leaf.shape)) for name in names for leaf in jax.tree.leaves(shapes[name]))


def test_C16_parameter_counts():
    formula, dead = 16_169_477 + 513 * sum(BLCA), 1_049_088
    assert formula == 17_909_060
    assert count(default_config()) == formula, "with weights of its own, the second attention is alive"
    faithful = setup.faithful_config()
    assert count(faithful) == formula - dead
    assert count(faithful, names=("CAB", "HSB")) == 13_538_309
    assert count(faithful, (7, 11, 5, 13, 9, 4), ("CAB", "HSB")) == 13_538_309


def test_initial_values_are_those_of_pytorch_layers():
    run = make_run(setup.faithful_config(model__tokens=3), setup.spec(feat=1024))
    params = jax.jit(run.init)(jax.random.key(0))[0]
    for layer, fan_in in ((params["CAB"]["proj"], 1024), (params["HSB"]["hazard_head"], 768)):
        for name in ("kernel", "bias"):
            assert np.abs(layer[name]).max() <= fan_in**-0.5
        np.testing.assert_allclose(layer["kernel"].std(), (3 * fan_in) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(params["CAB"]["tokens"].std(), 1.0, rtol=0.05)
    assert np.all(params["CAB"]["norm_out"]["scale"] == 1) and not params["CAB"]["norm_out"]["bias"].any()


def test_an_empty_slot_is_inert(run, params):
    batch = setup.batch()
    batch["segment_ids"] = np.where(batch["segment_ids"] == 2, 0, batch["segment_ids"])
    batch["weight"] = np.array([1, 0, 1, 1], np.float32)
    value, grads = value_and_gradient(run, params, batch)
    assert np.isfinite(value) and np.isfinite(largest(grads))
    assert np.isfinite(predict(run, params, batch)["risk"]).all()
