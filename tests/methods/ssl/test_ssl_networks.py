"""F3 checks 1 to 3 of More From Less: sizes, sharing, batch norm per branch; masks and shards of batch statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import paired_setup
import pytest
import ssl_setup as setup

from histokd_jax.methods.ssl import method as ssl
from histokd_jax.methods.ssl import networks


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_F3_1_parameter_counts_and_widths_of_the_released_networks():
    cfg = ssl.default_config()
    run = ssl.make_run(cfg, setup.data_spec(side=224))
    params, extra = jax.eval_shape(run.init, jax.random.key(0))
    assert count(params["encoder_0"]) == count(params["encoder_1"]) == 23_534_592
    assert count(params["encoder_0"]) + count(extra["encoder_0"]) == 23_587_712
    assert count(params["projector_0"]) == 151_019_520 + 32_768
    data = {k: jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.uint8) for k in ("image", "partner")}
    flags = {"has_partner": jax.ShapeDtypeStruct((2,), bool), "example": jax.ShapeDtypeStruct((2,), jnp.int32)}
    data |= flags | {"weight": jax.ShapeDtypeStruct((2,), jnp.float32)}
    found = jax.eval_shape(lambda p, e, d: run.forward(p, {}, e, d, None, False)[0], params, extra, data)
    assert found["h_0"].shape == (2, 2048) and {found[f"z_{k}"].shape for k in range(3)} == {(2, 8192)}


def test_F3_2_shared_numbers_share_arrays_and_separate_ones_do_not():
    data = setup.batch()
    for share in (True, False):
        run = setup.method(layout__share_primary=share, augment__preset="none", bn__mask_missing=False)
        params, extra = setup.init(run)
        first, _ = setup.forward(run, params, extra, data, train=False)
        changed = dict(params)
        changed["encoder_0"] = jax.tree.map(lambda x: x * 1.1, params["encoder_0"])
        second, _ = setup.forward(run, changed, extra, data, train=False)
        moved = [bool(np.any(first[f"z_{k}"] != second[f"z_{k}"])) for k in range(3)]
        assert moved == [True, share, False]


def test_F3_3_running_means_of_a_shared_encoder_are_updated_in_the_order_of_branches():
    run = setup.make(layout__name="privileged", layout__encoders=(0, 0), bn__mask_missing=False)
    params, extra = setup.init(run)
    data, key = setup.batch(), jax.random.key(3)
    # Darker by far, so that the order can be seen.
    data["partner"] = data["partner"] // 4
    _, new = setup.forward(run, params, extra, data, key=key)
    inputs, _ = ssl.seen.make_views(run.views, key, data, True)
    # The stem's convolution by hand: explicit padding of 3, stride 2, in float64.
    kernel = np.asarray(params["encoder_0"]["stem"]["conv"]["kernel"], np.float64)
    means = []
    for x in inputs:
        padded = np.pad(np.asarray(x, np.float64), ((0, 0), (3, 3), (3, 3), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), axis=(1, 2))[:, ::2, ::2]
        means.append(np.einsum("bijchw,hwco->o", windows, kernel) / np.prod(windows.shape[:3]))
    assert not np.allclose(means[0], means[1], rtol=1e-3), "the branches must differ, or the order could not be seen"
    expected = 0.99 * (0.01 * means[0]) + 0.01 * means[1]
    np.testing.assert_allclose(new["encoder_0"]["stem"]["norm"]["mean"], expected, rtol=1e-4)
    other = 0.99 * (0.01 * means[1]) + 0.01 * means[0]
    assert np.abs(expected - other).max() > 1e-3 * np.abs(expected).max()


def test_the_projector_equals_its_definition_in_float64():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5))
    network = networks.dense_network(5, (4, 7, 3))
    found = paired_setup.once(network.init, jax.random.key(0))
    params = jax.tree.map(lambda a: np.asarray(rng.normal(size=a.shape), np.float32), found["params"])
    y, stats = networks.apply(network, params, found["batch_stats"], jnp.asarray(x, jnp.float32), train=True)
    h = x
    for i in range(3):
        h = h @ np.float64(params[f"dense_{i}"]["kernel"]) + params[f"dense_{i}"]["bias"]
        if i < 2:
            mean, var = h.mean(axis=0), h.var(axis=0)
            np.testing.assert_allclose(stats[f"norm_{i}"]["mean"], 0.01 * mean, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(stats[f"norm_{i}"]["var"], 0.99 + 0.01 * var, rtol=1e-4)
            scale, shift = (np.float64(params[f"norm_{i}"][n]) for n in ("scale", "bias"))
            h = np.maximum((h - mean) / np.sqrt(var + 1e-3) * scale + shift, 0.0)
    np.testing.assert_allclose(y, h, rtol=1e-3, atol=1e-4)


def one_pass(network, variables, x, **options):
    run = lambda v, x: networks.apply(network, v["params"], v["batch_stats"], x, train=True, **options)  # noqa: E731
    return paired_setup.once(run, variables, x)


@pytest.fixture(scope="module")
def tiny_resnet():
    network = setup.make().networks["encoder_0"]
    return network, paired_setup.once(network.init, jax.random.key(0))


def test_absent_rows_do_not_enter_batch_statistics(tiny_resnet):
    network, variables = tiny_resnet
    x = np.random.default_rng(0).uniform(0, 255, (6, 16, 16, 3)).astype(np.float32)
    where = np.array([True, False, True, True, False, True])
    found, stats = one_pass(network, variables, x, where=jnp.asarray(where))
    expected, own = one_pass(network, variables, x[where])
    np.testing.assert_allclose(found[where], expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(own)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    nobody, kept = one_pass(network, variables, x, where=jnp.zeros(6, bool))
    assert np.isfinite(nobody).all()
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(variables["batch_stats"])):
        np.testing.assert_array_equal(a, b)


def test_statistics_per_device_are_those_of_the_parts(tiny_resnet):
    network, variables = tiny_resnet
    x = np.random.default_rng(1).uniform(0, 255, (8, 16, 16, 3)).astype(np.float32)
    found, stats = one_pass(network, variables, x, shards=2)
    parts = [one_pass(network, variables, part) for part in (x[:4], x[4:])]
    np.testing.assert_allclose(found, np.concatenate([p[0] for p in parts]), rtol=1e-4, atol=1e-4)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, parts[0][1], parts[1][1])
    for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(mean)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="8 examples cannot be divided over 3 devices"):
        one_pass(network, variables, x, shards=3)


def test_encoders_of_vectors_and_transformers_are_built_for_the_data():
    genes = setup.make(vector=9)
    assert genes.networks["encoder_1"].sample == (9,) and genes.networks["encoder_1"].features == 16
    vit = setup.make(encoder__kind="vit", encoder__patch=8, encoder__token_width=16, encoder__depth=1, encoder__heads=2)
    assert vit.networks["encoder_0"].features == 16 and not vit.networks["encoder_0"].has_train
    params, extra = jax.eval_shape(vit.init, jax.random.key(0))
    assert set(extra) == {"projector_0", "projector_1"} and set(params) == {*extra, "encoder_0", "encoder_1"}
    split = setup.make(loss__split_dims=(8, 4))
    assert {g: n.features for g, n in split.networks.items() if g.startswith("p")} == {
        "projector_0": 12,
        "projector_1": 4,
        "projector_2": 8,
    }
    skipped = setup.make(projector__widths=())
    assert set(skipped.networks) == {"encoder_0", "encoder_1"}
