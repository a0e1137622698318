"""The three networks: sizes, initialisation, pooling, tokens, masks; checks F, G and H of the specification."""

import functools

import jax
import jax.numpy as jnp
import mkd_setup as setup
import numpy as np
import pytest

from histokd_jax.methods.mkd.networks import NetworkSpec, build
from histokd_jax.methods.registry import get_method
from histokd_jax.types import DataSpec


@pytest.fixture(scope="module")
def method():
    return setup.small_method()


@pytest.fixture(scope="module")
def params(method):
    return jax.jit(method.init)(jax.random.key(0))[0]


@functools.lru_cache
def compiled(function, train):
    return jax.jit(lambda p, b, key: function(p, {}, {}, b, key, train)[0])


def forward(method, params, batch, key=None, train=False):
    return compiled(method.forward, train)(params, batch, key)


def assert_same(a, b, tol=1e-5):
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=tol, atol=tol, err_msg=k)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_check_H_parameter_counts():
    config = setup.default_config()
    method = get_method("mkd")(config, DataSpec(1024, 2, 8192))
    shapes, _ = jax.eval_shape(method.init, jax.random.key(0))
    assert {k: count(v) for k, v in shapes.items()} == {"S_P": 328_835, "T_M": 5_214_916, "T_G": 197_763}
    assert count(shapes["S_P"]["bag"]["attention"]) == 65_921
    assert count([shapes["T_M"]["fusion"][z] for z in ("z1", "z2")]) == 4_194_368


def test_initialisation_of_student_and_genomic_teacher():
    method = get_method("mkd")(setup.default_config(), DataSpec(1024, 2, 8192))
    params, _ = jax.jit(method.init)(jax.random.key(0))
    for layer, fan_in in ((params["S_P"]["bag"]["proj"], 1024), (params["T_G"]["genes"]["tokens"]["proj"], 512)):
        np.testing.assert_allclose(np.std(layer["kernel"]), fan_in**-0.5, rtol=0.02)
        # A normal, not a truncated one: the largest of so many draws lies beyond 3.5 standard deviations.
        assert np.abs(layer["kernel"]).max() > 3.5 * fan_in**-0.5
        np.testing.assert_array_equal(layer["bias"], 0.0)
    for layer, bound in ((params["T_M"]["bag"]["proj"], 1 / 32), (params["T_M"]["fusion"]["z1"], 1 / 16)):
        for x in layer.values():
            assert 0.9 * bound < np.abs(x).max() <= bound
        np.testing.assert_allclose(np.std(layer["kernel"]), bound / 3**0.5, rtol=0.02)


def test_initialisation_switch_of_the_multimodal_teacher():
    method = setup.small_method(init__t_m="lecun_normal_zero_bias")
    params, _ = jax.jit(method.init)(jax.random.key(0))
    np.testing.assert_array_equal(params["T_M"]["bag"]["proj"]["bias"], 0.0)
    assert np.abs(params["T_M"]["fusion"]["z1"]["bias"]).max() > 0


def test_initial_values_do_not_depend_on_the_other_teacher():
    both, _ = jax.jit(setup.small_method().init)(jax.random.key(0))
    one, _ = jax.jit(setup.small_method(teachers=("G",)).init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, {k: both[k] for k in one}, one)


@pytest.mark.parametrize("fill", [1e6, np.nan])
def test_check_F1_padding_is_unobservable(method, params, fill):
    clean, dirty = setup.batch(setup.padded, fill=0.0), setup.batch(setup.padded, length=11, fill=fill)
    assert_same(forward(method, params, clean), forward(method, params, dirty))

    def loss(params, patches, batch):
        out, _ = method.forward(params, {}, {}, batch | {"patches": patches}, None, False)
        return method.objective(out, batch, 0, "online")[0]

    grad = jax.jit(jax.grad(loss, (0, 1)))
    (g_clean, _), (g_dirty, g_patches) = (grad(params, b["patches"], b) for b in (clean, dirty))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), g_clean, g_dirty)
    np.testing.assert_array_equal(g_patches[dirty["segment_ids"] == 0], 0.0)
    assert np.abs(g_patches[dirty["segment_ids"] > 0]).max() > 0


def test_check_F2_patch_order_is_irrelevant(method, params):
    patches = setup.bags()
    reverse = setup.packed([p[::-1] for p in patches]) | setup.slot_fields(len(patches))
    assert_same(forward(method, params, setup.batch()), forward(method, params, reverse))


@pytest.mark.parametrize("mode", ["pathology", "both"])
def test_check_F3_F5_attention_sums_to_one(method, params, mode):
    batch = setup.batch()
    weights = np.asarray(method.attention(params, {}, {}, batch, mode))
    ids = batch["segment_ids"]
    assert weights.shape == ids.shape and np.all(weights[ids == 0] == 0)
    for slot, size in enumerate(setup.SIZES, start=1):
        np.testing.assert_allclose(weights[ids == slot].sum(), 1.0, rtol=1e-6)
        if size == 1:
            np.testing.assert_allclose(weights[ids == slot], [1.0], rtol=1e-6)


def test_check_F4_duplicated_patches_leave_the_embedding(method, params):
    patches = setup.bags()
    double = setup.packed([np.concatenate([p, p]) for p in patches]) | setup.slot_fields(len(patches))
    assert_same(forward(method, params, setup.batch()), forward(method, params, double))


def test_check_F6_empty_slot_gives_zero_embedding_and_no_gradient(method, params):
    """A bag without patches is refused where data are read; an empty slot of a step must stay inert."""
    batch = setup.batch()
    batch["segment_ids"] = np.where(batch["segment_ids"] == 2, 0, batch["segment_ids"])
    batch["weight"] = np.array([1, 0, 1, 1], np.float32)
    out = forward(method, params, batch)
    np.testing.assert_array_equal(out["P"][1], 0.0)
    assert all(np.all(np.isfinite(v)) for v in out.values())


def permuted_genes(batch, order):
    return batch | {"genes": batch["genes"][:, order]}


def test_check_G1_token_order_is_irrelevant(method, params):
    batch = setup.batch()
    tokens = np.arange(setup.GENES).reshape(4, 4)[[2, 0, 3, 1]].reshape(-1)
    assert_same(forward(method, params, batch), forward(method, params, permuted_genes(batch, tokens)))


def test_check_G2_gene_order_matters(method, params):
    batch = setup.batch()
    order = np.random.default_rng(0).permutation(setup.GENES)
    base, moved = forward(method, params, batch), forward(method, params, permuted_genes(batch, order))
    for k in ("G", "z_G", "M"):
        assert np.abs(base[k] - moved[k]).max() > 1e-3
    np.testing.assert_array_equal(base["P"], moved["P"])


def test_own_encoders_share_no_weights(params):
    assert not np.array_equal(params["T_M"]["bag"]["proj"]["kernel"], params["S_P"]["bag"]["proj"]["kernel"])
    tokens = [params[n]["genes"]["tokens"]["proj"]["kernel"] for n in ("T_M", "T_G")]
    assert not np.array_equal(*tokens)


def test_student_embedding_is_free_of_dropout_noise(method, params):
    batch, key = setup.batch(), jax.random.key(5)
    quiet, noisy = forward(method, params, batch), forward(method, params, batch, key, True)
    np.testing.assert_array_equal(quiet["P"], noisy["P"])
    for k in ("z_P", "M", "z_M", "G", "z_G"):
        assert np.abs(quiet[k] - noisy[k]).max() > 1e-4


@pytest.mark.parametrize("overrides", [{}, {"variant": "gmkdn"}], ids=["mkd", "gmkdn"])
def test_dropout_masks_do_not_depend_on_layout(overrides):
    method = setup.small_method(**overrides)
    params, _ = jax.jit(method.init)(jax.random.key(0))
    key = jax.random.key(9)
    packed, padded = (forward(method, params, setup.batch(f), key, True) for f in (setup.packed, setup.padded))
    assert_same(packed, padded)


def test_gene_dropout_and_clip_switches():
    batch = setup.batch()
    batch["genes"] = 10 * batch["genes"]
    clipped = batch | {"genes": np.clip(batch["genes"], -2, 2)}
    plain, clip = setup.small_method(), setup.small_method(genes__clip=2.0)
    params, _ = jax.jit(plain.init)(jax.random.key(0))
    assert_same(forward(clip, params, batch), forward(plain, params, clipped))
    quiet = setup.small_method(model__gene_dropout=0.0, model__gene_input_dropout=0.0)
    noisy = setup.small_method(model__gene_dropout=0.0, model__gene_input_dropout=0.5)
    key = jax.random.key(1)
    base = forward(quiet, params, batch)["G"]
    np.testing.assert_array_equal(forward(quiet, params, batch, key, True)["G"], base)
    assert np.abs(forward(noisy, params, batch, key, True)["G"] - base).max() > 1e-3


def test_bfloat16_compute_keeps_float32_parameters_and_stays_close():
    exact, half = setup.small_method(), setup.small_method(train__compute_dtype="bfloat16")
    params, _ = jax.jit(half.init)(jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    a, b = (forward(m, params, setup.batch()) for m in (exact, half))
    for k in a:
        assert b[k].dtype == jnp.float32
        np.testing.assert_allclose(b[k], a[k], atol=0.05)
    assert any(np.abs(a[k] - b[k]).max() > 0 for k in a)


def test_float16_patches_are_cast_inside(method, params):
    batch = setup.batch()
    batch["patches"] = batch["patches"].astype(np.float16)
    exact = batch | {"patches": batch["patches"].astype(np.float32)}
    assert_same(forward(method, params, exact), forward(method, params, batch), 1e-6)


def test_wrong_patch_width_is_named(method, params):
    batch = setup.batch()
    batch["patches"] = batch["patches"][..., :4]
    with pytest.raises(ValueError, match="4 wide"):
        method.forward(params, {}, {}, batch, None, False)


def test_gmkdn_streams_are_not_interchangeable():
    method = setup.small_method(variant="gmkdn")
    params, _ = jax.jit(method.init)(jax.random.key(0))
    batch = setup.batch()
    swapped = batch | {"genes": batch["cnv"], "cnv": batch["genes"]}
    a, b = forward(method, params, batch), forward(method, params, swapped)
    for k in ("G", "M"):
        assert np.abs(a[k] - b[k]).max() > 1e-4
    with pytest.raises(ValueError, match="cnv"):
        method.forward(params, {}, {}, {k: v for k, v in batch.items() if k != "cnv"}, None, False)


def test_build_selects_teachers():
    assert set(build(NetworkSpec(), ("G",))) == {"S_P", "T_G"}
