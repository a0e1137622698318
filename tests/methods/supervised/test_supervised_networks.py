"""The bag baselines: sizes, invariances, attention, initialisation; checks B1 to B6 of the specification."""

import functools

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import supervised_setup as setup

from histokd_jax.methods.supervised.networks import NetworkSpec, network
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.clustered import ClusteredBags
from histokd_jax.nn.mil.readout import LateBilinear
from histokd_jax.nn.snn import SelfNormalising
from histokd_jax.ops.dropout import slot_alpha_dropout

BLCA = 3062
COUNTS = {
    "snn": ({}, 982_532),
    "deepsets": ({}, 657_156),
    "deepsets concat": ({"fusion": "concat"}, 1_704_196),
    "deepsets bilinear": ({"fusion": "bilinear"}, 1_903_300),
    "abmil": ({}, 920_069),
    "abmil amil": ({"rho": 0}, 789_765),
    "abmil concat": ({"fusion": "concat"}, 1_967_109),
    "abmil bilinear": ({"fusion": "bilinear"}, 2_166_213),
    "deepattnmisl": ({}, 8_532_485),
    "deepattnmisl concat": ({"fusion": "concat"}, 9_579_525),
    "deepattnmisl bilinear": ({"fusion": "bilinear"}, 9_778_629),
    "clam_sb": ({}, 793_869),
    "clam_mb": ({}, 794_640),
    "clam_sb big": ({"attn": 384}, 925_325),
    "clam_mb big": ({"attn": 384}, 926_480),
    "dsmil": ({}, 153_860),
}


def example(feat_dim, genes, slots=1):
    ids = jnp.ones((1, 4), jnp.int32)
    bags = ClusteredBags(jnp.zeros((1, 4, feat_dim)), ids, jnp.arange(4, dtype=jnp.int32)[None], slots, 0 * ids)
    return bags, {"genes": jnp.zeros((slots, genes))}


@pytest.mark.parametrize("case", COUNTS)
def test_B1_parameter_counts(case):
    name, (options, expected) = case.split()[0], COUNTS[case]
    entry = network(name)
    outputs = 2 if name == "dsmil" else 4
    module = entry.build(NetworkSpec(1024, outputs, BLCA), {**entry.options, **options})
    bags, genes = example(1024, BLCA)
    bags = bags if name == "deepattnmisl" else bags.bags()
    shapes = jax.eval_shape(lambda key: module.init(key, bags, genes), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected
    torch = entry.torch({**entry.options, **options}, outputs)
    assert len(torch) == len(jax.tree.leaves(shapes))


PATCH_NETWORKS = ("deepsets", "abmil", "deepattnmisl", "clam_sb", "clam_mb", "dsmil")


@pytest.fixture(scope="module")
def built():
    """name -> (method, parameters), built once."""
    made = {}

    def get(name):
        if name not in made:
            method = setup.small_method(name)
            made[name] = method, drawn.variables(method.init, jax.random.key(3))[0]
        return made[name]

    return get


@functools.lru_cache
def compiled(function, train):
    return jax.jit(lambda p, b: function(p, {}, {}, b, jax.random.key(5), train)[0])


def forward(method, params, batch, train=False):
    return compiled(method.forward, train)(params, batch)


def assert_same(a, b, tol=2e-5):
    assert set(a) == set(b)
    for k in a:
        np.testing.assert_allclose(a[k], b[k], rtol=tol, atol=tol, err_msg=k)


@pytest.mark.parametrize("train", [False, True], ids=["quiet", "dropout"])
@pytest.mark.parametrize("name", PATCH_NETWORKS)
def test_B2_order_and_padding_do_not_matter(built, name, train):
    """Shuffled over all rows, with more padding, and with NaN in place of zeros on padding; dropout draws the same."""
    method, params = built(name)
    total = sum(setup.SIZES)
    base = forward(method, params, setup.batch(fill=0.0), train)
    for fill, row in ((np.nan, 8), (7.0, 40)):
        order = np.random.default_rng(2).permutation(total)
        assert_same(forward(method, params, setup.batch(order=order, fill=fill, row=row), train), base)


@pytest.mark.parametrize("name", PATCH_NETWORKS)
def test_packed_equals_one_bag_at_a_time(built, name):
    """Bags of 19, 1, 7 and 3 patches: one is smaller than the top-k of CLAM, one has a single patch."""
    method, params = built(name)
    together = forward(method, params, setup.batch())
    assert all(np.all(np.isfinite(v)) for v in together.values())
    for i in range(len(setup.SIZES)):
        assert_same(forward(method, params, setup.one_bag(i)), {k: v[i : i + 1] for k, v in together.items()})


@pytest.mark.parametrize("name", PATCH_NETWORKS)
def test_gradient_of_a_step_equals_the_mean_over_bags_and_survives_nan_padding(built, name):
    method, params = built(name)

    def loss(params, batch):
        out, _ = method.forward(params, {}, {}, batch, None, False)
        return method.objective(out, batch)[0]

    gradient = jax.jit(jax.grad(loss))
    together = gradient(params, setup.batch())
    parts = [gradient(params, setup.one_bag(i)) for i in range(len(setup.SIZES))]
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), together, mean)
    assert any(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(together))


def test_B3_deep_sets_of_a_repeated_bag():
    patches = setup.bags((5,))
    for pool, factor in (("sum", 2.0), ("mean", 1.0)):
        method = setup.small_method("deepsets", model__deepsets__pool=pool)
        params = drawn.variables(method.init, jax.random.key(0))[0]
        once, twice = (
            forward(method, params, setup.rows([np.concatenate(patches * n)]) | setup.slot_fields(1)) for n in (1, 2)
        )
        np.testing.assert_allclose(twice["pooled"], factor * once["pooled"], rtol=1e-5)


@pytest.mark.parametrize("name", PATCH_NETWORKS)
def test_B4_attention_sums_to_one_and_is_zero_on_padding(built, name):
    method, params = built(name)
    batch = setup.batch()
    weights = np.asarray(method.attention(params, {}, {}, batch, "pathology"))
    ids = batch["segment_ids"]
    assert np.all(weights[ids == 0] == 0) and weights.shape == ids.shape
    sums = [weights[ids == s + 1].sum() for s in range(len(setup.SIZES))]
    np.testing.assert_allclose(sums, 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", ["clam_mb", "dsmil"])
def test_B4_one_distribution_per_class(name):
    entry = network(name)
    module = entry.build(NetworkSpec(setup.FEAT, 4, chunk=8), {**entry.options, **setup.NARROW[name]})
    batch = setup.batch()
    bags = Bags(*(batch[k] for k in ("patches", "segment_ids", "positions")), num_slots=4)
    params = drawn.variables(lambda key: module.init(key, bags), jax.random.key(0))
    maps = np.asarray(module.apply(params, bags, method="attention_maps"))
    assert maps.shape == (4, *batch["segment_ids"].shape)
    for s in range(4):
        np.testing.assert_allclose(maps[:, batch["segment_ids"] == s + 1].sum(axis=1), 1.0, rtol=1e-5)
    assert np.abs(maps[0] - maps[1]).max() > 1e-4


def test_B4_all_patches_in_one_of_ten_clusters():
    method = setup.small_method("deepattnmisl", model__deepattnmisl__clusters=10)
    params = drawn.variables(method.init, jax.random.key(0))[0]
    batch = setup.batch()
    batch["clusters"] = np.full_like(batch["clusters"], 4)

    def loss(params):
        out, _ = method.forward(params, {}, {}, batch, None, False)
        return method.objective(out, batch)[0], out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    empty = [c for c in range(10) if c != 4]
    assert np.all(np.asarray(out["cluster_means"])[:, empty] == 0)
    np.testing.assert_allclose(out["cluster_attention"].sum(axis=1), 1.0, rtol=1e-6)
    assert all(np.all(grads["network"][f"first_{c}"]["kernel"] == 0) for c in empty)


def test_deepattnmisl_means_equal_a_loop_over_slides_and_clusters():
    method = setup.small_method("deepattnmisl")
    params = drawn.variables(method.init, jax.random.key(1))[0]
    batch = setup.batch()
    means = forward(method, params, batch)["cluster_means"]
    layer = {k: jax.tree.map(lambda x: np.asarray(x, np.float64), v) for k, v in params["network"].items()}
    for s in range(4):
        for c in range(3):
            own = batch["patches"][(batch["segment_ids"] == s + 1) & (batch["clusters"] == c)].astype(np.float64)
            for part in ("first", "second"):
                own = np.maximum(own @ layer[f"{part}_{c}"]["kernel"] + layer[f"{part}_{c}"]["bias"], 0)
            expected = own.mean(axis=0) if len(own) else np.zeros(8)
            np.testing.assert_allclose(means[s, c], expected, rtol=1e-5, atol=1e-6)


def test_unknown_cluster_ids_are_named():
    entry = network("deepattnmisl")
    module = entry.build(NetworkSpec(6, 4), {**entry.options, **setup.NARROW["deepattnmisl"]})
    bags, _ = example(6, 1)
    bad = bags._replace(clusters=jnp.full((1, 4), 3))
    with pytest.raises(ValueError, match="cluster ids lie in 3..3, but the network has 3 clusters"):
        module.init(jax.random.key(0), bad)


def test_B5_bilinear_block():
    """1,089 products, the last of which is 1; each gate reads [image, omics] in that order."""
    block = LateBilinear(256, 256, 256)
    rng = np.random.default_rng(0)
    image, omic = rng.normal(size=(2, 3, 256)).astype(np.float32)
    params = block.init(jax.random.key(0), image, omic)["params"]
    outer = np.asarray(block.apply({"params": params}, image, omic, method="outer"))
    assert outer.shape == (3, 1089) and np.all(outer[:, -1] == 1)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    factors = []
    for i, own in ((1, image), (2, omic)):
        gate = 1 / (1 + np.exp(-dense(f"z{i}", np.concatenate([image, omic], axis=1))))
        factor = np.maximum(dense(f"o{i}", gate * np.maximum(dense(f"h{i}", own), 0)), 0)
        factors.append(np.concatenate([factor, np.ones((3, 1))], axis=1))
    expected = np.einsum("si,sj->sij", *factors).reshape(3, -1)
    np.testing.assert_allclose(outer, expected, rtol=1e-4, atol=1e-5)
    fused = np.maximum(dense("merge", np.maximum(dense("encode", expected), 0)), 0)
    np.testing.assert_allclose(block.apply({"params": params}, image, omic), fused, rtol=1e-4, atol=1e-5)


def test_B6_alpha_dropout_keeps_mean_and_variance_and_is_off_in_evaluation():
    x = np.random.default_rng(1).standard_normal((1000, 1000)).astype(np.float32)
    out = np.asarray(jax.jit(lambda x: slot_alpha_dropout(x, jnp.uint32(11), 0.25, 0))(x), np.float64)
    assert abs(out.mean() - x.mean()) < 0.01 and abs(out.var() / x.var() - 1) < 0.01
    body = SelfNormalising(4, (8,), 0.25)
    params = body.init(jax.random.key(0), jnp.ones((2, 4)))
    block = params["params"]["blocks_0"]
    expected = jax.nn.elu(jnp.ones((2, 4)) @ block["kernel"] + block["bias"][None])
    np.testing.assert_allclose(body.apply(params, jnp.ones((2, 4))), expected, rtol=1e-6)
    assert np.abs(body.apply(params, jnp.ones((2, 4)), jnp.uint32(1)) - expected).max() > 0.1


def test_initialisation():
    """SNN: normal; AMIL: Xavier normal; DSMIL: orthogonal, all with zero biases; the others uniform."""

    def start(method):
        return jax.jit(method.init)(jax.random.key(0))[0]["network"]

    snn = start(setup.small_method("snn", model__snn__widths=(256, 8)))
    np.testing.assert_allclose(np.std(snn["body"]["blocks_0"]["kernel"]), setup.GENES**-0.5, rtol=0.05)
    amil = setup.small_method("abmil", model__abmil__init="xavier_normal", model__abmil__width=512)
    proj = start(amil)["bag"]["proj"]
    np.testing.assert_allclose(np.std(proj["kernel"]), (2 / (setup.FEAT + 512)) ** 0.5, rtol=0.05)
    dsmil = start(setup.small_method("dsmil"))
    for layer in (dsmil["queries_0"], dsmil["queries_1"], dsmil["head"]):
        gram = layer["kernel"].T @ layer["kernel"]
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    for layer in (snn["body"]["blocks_0"], proj, dsmil["instance"]):
        np.testing.assert_array_equal(layer["bias"], 0.0)
    plain = start(setup.small_method("abmil", model__abmil__width=512))["bag"]["proj"]
    for x in plain.values():
        assert 0.9 * setup.FEAT**-0.5 < np.abs(x).max() <= setup.FEAT**-0.5
