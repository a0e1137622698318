"""G-HANet as a Method: steps equal accumulation, dropout, deployment, ablations; check C26 of the specification."""

import ghanet_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from histokd_jax.methods.registry import get_method, method_module
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.types import DataSpec


@pytest.fixture(scope="module")
def method():
    return setup.small_method()


@pytest.fixture(scope="module")
def params(method):
    return jax.jit(method.init)(jax.random.key(0))[0]


def step_loss(method, batch, key=None):
    def loss(params):
        out, _ = method.forward(params, {}, {}, batch, key, key is not None)
        return method.objective(out, batch)[0]

    return loss


def assert_trees_close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def one_bag(i):
    full = setup.slot_fields(len(setup.SIZES))
    return setup.padded([setup.bags()[i]], length=max(setup.SIZES)) | {k: v[i : i + 1] for k, v in full.items()}


def test_a_step_equals_accumulated_batches_of_one(method, params):
    """The reference sums the gradients of single patients, each divided by the window."""
    value, grads = jax.jit(jax.value_and_grad(step_loss(method, setup.batch())))(params)
    singles = small_window(1)
    alone = jax.jit(jax.value_and_grad(lambda params, batch: step_loss(singles, batch)(params)))
    parts = [alone(params, one_bag(i)) for i in range(len(setup.SIZES))]
    window = len(setup.SIZES)
    np.testing.assert_allclose(value, sum(v for v, _ in parts) / window, rtol=1e-5)
    assert_trees_close(grads, jax.tree.map(lambda *g: sum(g) / window, *[g for _, g in parts]))


def small_window(b):
    return setup.small_method(train__b=b)


def test_C22_an_overfull_step_is_divided_by_the_window(params):
    """`carry` divides the sum over a first step with leftovers by the window, as the reference does."""
    carry, drop = small_window(2), setup.small_method(train__b=2, train__remainder="drop")
    batch = setup.batch()
    losses = [jax.jit(step_loss(method, batch))(params) for method in (carry, drop)]
    ratio = losses[0] / losses[1]
    np.testing.assert_allclose(ratio, len(setup.SIZES) / 2, rtol=1e-5)


def test_slides_without_genes_train_survival_only(method, params):
    batch = setup.batch()
    batch["has_genes"] = np.array([True, False, True, False])
    batch["genes"][1::2] = np.nan
    loss, metrics = jax.jit(lambda p: method.objective(method.forward(p, {}, {}, batch, None, False)[0], batch))(params)
    whole = jax.jit(lambda p: method.objective(method.forward(p, {}, {}, setup.batch(), None, False)[0], setup.batch()))
    np.testing.assert_allclose(metrics["surv"][0], whole(params)[1]["surv"][0], rtol=1e-6)
    np.testing.assert_allclose(loss, metrics["surv"][0] + 0.3 * metrics["rec"][0], rtol=1e-6)
    assert metrics["rec"][0] < whole(params)[1]["rec"][0] and metrics["cos_1"][1] == 2
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(step_loss(method, batch)))(params)))


@pytest.mark.parametrize("pool", ["chunked", "segment"])
def test_dropout_masks_do_not_depend_on_the_layout(params, pool):
    method, key = setup.small_method(data__pool=pool), jax.random.key(5)
    run = jax.jit(lambda p, b: method.forward(p, {}, {}, b, key, True)[0])
    packed, padded = setup.batch(), setup.batch(setup.padded, length=40, fill=3.0)
    a, b = run(params, packed), run(params, padded)
    assert_trees_close(a, b, atol=1e-5)
    quiet = jax.jit(lambda p: method.forward(p, {}, {}, packed, None, False)[0])(params)
    assert np.abs(quiet["logits"] - a["logits"]).max() > 1e-3


def test_dropped_attention_probabilities_equal_numpy():
    """Softmax, then inverted dropout of the probabilities of every head, query and patch (section 4.1)."""
    from histokd_jax.methods.ghanet.layers import normalise
    from histokd_jax.ops.dropout import hash_dropout

    run = setup.small_run(cab__passes=1, data__pool="chunked", model__dropout=0.4)
    params = jax.jit(run.init)(jax.random.key(0))[0]["CAB"]
    patches, seed = setup.bags((9,))[0], jnp.uint32(7)
    batch = setup.padded([patches], length=12)
    bags = Bags(*(jnp.asarray(batch[k]) for k in ("patches", "segment_ids", "positions")), num_slots=1)
    cab = run.networks["CAB"]
    bound = cab.bind({"params": params})
    tokens = bound.norm_query_1(params["tokens"][None])
    done = bound._read(bags, bound.cross_attn, tokens, 1, seed)
    ids, positions = jnp.ones(9, jnp.int32), jnp.arange(9, dtype=jnp.int32)
    e = jnp.maximum(patches @ params["proj"]["kernel"] + params["proj"]["bias"][None], 0).T
    c = np.asarray(normalise(params["norm_context"], hash_dropout(e, seed, ids, positions, 0.4, 0), 0), np.float64).T
    w = {k: np.asarray(v["kernel"], np.float64) for k, v in params["cross_attn"].items()}
    heads, width = 2, 4
    q, k, v = (
        (x @ w[n]).reshape(-1, heads, width) for n, x in (("q", np.asarray(tokens[0], np.float64)), ("k", c), ("v", c))
    )
    s = np.einsum("qhd,nhd->hqn", q, k) / np.sqrt(width)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    keep = np.asarray(hash_dropout(jnp.ones((6, 9)), seed, ids, positions, 0.4, 1)).reshape(2, 3, 9)
    np.testing.assert_allclose(np.unique(keep), [0.0, 1 / 0.6], rtol=1e-6)
    out = np.einsum("hqn,nhd->qhd", p * keep, v).reshape(3, -1) @ w["out"] + np.asarray(
        params["cross_attn"]["out"]["bias"]
    )
    np.testing.assert_allclose(done.output[0], out, rtol=1e-4, atol=1e-5)


ABLATIONS = {
    "no_cab": {"cab__enabled": False},
    "one_pass": {"cab__passes": 1},
    "own_attention": {"cab__second_attention": "own"},
    "fusion_none": {"cab__fusion": "none"},
    "fusion_concat": {"cab__fusion": "concat"},
    "morphology": {"hsb__map": "morphology"},
    "genotype": {"hsb__map": "genotype"},
    "uniform": {"hsb__map": "uniform"},
    "ratio": {"hsb__ratio": 1.0},
    "free_map": {"hsb__detach_map": False},
    "detached_tokens": {"cab__detach_tokens": True},
    "prob": {"hsb__map_source": "prob"},
    "first_pass": {"hsb__map_pass": "first"},
    "no_hyper": {"hsb__hyper_layer": False},
    "no_self_attention": {"hsb__self_attention": False},
    "no_ffn": {"hsb__ffn": False},
    "prenorm": {"hsb__prenorm": True},
    "readout_mean": {"hsb__readout": "mean"},
    "no_rec": {"loss__rec_weight": 0.0},
    "sce": {"loss__rec_terms": "sce"},
    "mse": {"loss__rec_terms": "mse"},
    "power": {"loss__sce_power": 2.0},
    "ce": {"loss__survival": "ce"},
    "cox": {"loss__survival": "cox"},
    "bf16": {"train__compute_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def standard(method, params):
    """Loss and gradient of the faithful network."""
    return jax.jit(jax.value_and_grad(step_loss(method, setup.batch(), jax.random.key(1))))(params)


# One per part of the network; the others only in the slow suite.
QUICK = ("no_cab", "free_map", "cox")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ABLATIONS])
def test_every_ablation_trains_and_predicts(params, standard, name):
    """Each switch gives a finite loss and gradient, and (with the same values where names agree) another result."""
    other = setup.small_method(**ABLATIONS[name], data__pool="chunked" if name == "bf16" else "segment")
    own = jax.jit(other.init)(jax.random.key(0))[0]
    batch = setup.batch()
    value, grads = jax.jit(jax.value_and_grad(step_loss(other, batch, jax.random.key(1))))(own)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    deployed = {group: own[group] for group in other.mode("pathology").params}
    fields = {k: batch[k] for k in other.mode("pathology").fields}
    given = {}, {}, fields, "pathology"
    found, weights = jax.jit(lambda p: (other.predict(p, *given), other.attention(p, *given)))(deployed)
    assert found["risk"].shape == (4,) and np.isfinite(found["risk"]).all()
    assert found["hazards"].shape == ((4, 0) if name == "cox" else (4, 4))
    same = jax.tree.structure(own) == jax.tree.structure(params) and name != "bf16"
    if same and float(standard[0]) == float(value):
        differ = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), grads, standard[1])
        assert max(jax.tree.leaves(differ)) > 1e-7, f"{name} changes nothing"
    weights = np.asarray(weights)
    for slot in range(1, 5):
        np.testing.assert_allclose(
            weights[batch["segment_ids"] == slot].sum(), 1.0, rtol=2e-2 if name == "bf16" else 1e-4
        )


def test_skipped_group_has_a_token_and_no_head():
    method = setup.small_method(groups=(3, 0, 4))
    params = jax.jit(method.init)(jax.random.key(0))[0]
    assert sorted(params["HEADS"]) == ["head_0", "head_2"] and params["CAB"]["tokens"].shape[0] == 3
    batch = setup.batch() | {"genes": np.zeros((4, 7), np.float32)}
    loss, metrics = jax.jit(lambda p: method.objective(method.forward(p, {}, {}, batch, None, False)[0], batch))(params)
    assert np.isfinite(loss) and "cos_2" not in metrics and "cos_3" in metrics


def test_traced_weights_equal_those_of_the_configuration(method, params):
    batch = setup.batch()
    out = jax.jit(lambda p: method.forward(p, {}, {}, batch, None, False)[0])(params)
    for weight in (0.0, 0.7):
        fixed = setup.small_method(loss__rec_weight=weight, loss__alpha=0.4).objective(out, batch)[0]
        values = {"loss.rec_weight": jnp.float32(weight), "loss.alpha": jnp.float32(0.4)}
        np.testing.assert_allclose(method.objective(out, batch, values=values)[0], fixed, rtol=1e-6)
    assert set(method.traced) == set(values)
    with pytest.raises(ValueError, match="cannot vary"):
        method.objective(out, batch, values={"hsb.ratio": jnp.float32(0.1)})


def trainer(method):
    """(seed, epochs) -> losses of plain Adam with L2 in the gradient, two steps per epoch."""
    tx = optax.chain(optax.add_decayed_weights(1e-5), optax.scale_by_adam(), optax.scale(-1e-3))

    @jax.jit
    def step(params, state, batch, key):
        def loss(params):
            return method.objective(method.forward(params, {}, {}, batch, key, True)[0], batch)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def train(seed, epochs=3):
        params = jax.jit(method.init)(jax.random.key(seed))[0]
        state, losses = tx.init(params), []
        for i in range(2 * epochs):
            key = jax.random.fold_in(jax.random.key(seed), i)
            params, state, value = step(params, state, setup.batch(seed=i % 2), key)
            losses.append(float(value))
        return losses

    return train


def test_C26_same_seed_gives_identical_losses(method):
    train = trainer(method)
    first = train(3)
    assert first == train(3) and first != train(4)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "axes,detach", [pytest.param((4, 1), True, marks=SLOW), ((2, 4), True), pytest.param((2, 4), False, marks=SLOW)]
)
def test_devices_give_the_values_and_gradients_of_one(params, axes, detach):
    method = setup.small_method(data__pool="chunked", hsb__detach_map=detach)
    batch = setup.packed(setup.bags(), rows=8) | setup.slot_fields(len(setup.SIZES))
    key = jax.random.key(2)
    expected = jax.jit(jax.value_and_grad(step_loss(method, batch, key)))(params)
    mesh = jax.make_mesh(axes, ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.value_and_grad(step_loss(method, batch, key)))(params)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert_trees_close(found[1], expected[1], rtol=1e-3, atol=1e-5)


def test_the_method_tells_what_it_reads(method):
    assert method.requires == (
        "patches",
        "segment_ids",
        "positions",
        "weight",
        "label",
        "time_months",
        "event",
        "genes",
    )
    assert method.mode("pathology").params == ("CAB", "HSB")
    assert method.mode("pathology").fields == ("weight", "patches", "segment_ids", "positions")
    assert [s.trainable for s in method.stages] == [("CAB", "HEADS", "HSB")] and method.batch_coupled
    assert "genes" not in setup.small_method(loss__rec_weight=0.0).requires
    assert get_method("ghanet") is method_module("ghanet").make_method


BAD = {
    "tokens": (dict(model__tokens=5), {}, "model.tokens = 5, but there are 3 gene groups"),
    "ratio": (dict(hsb__ratio=0.0), {}, "hsb.ratio = 0.0 is out of range"),
    "word": (dict(hsb__map="all"), {}, "hsb.map = 'all' is unknown"),
    "genotype": (dict(cab__enabled=False, hsb__map="genotype"), {}, "cab.enabled = False"),
    "cox": (dict(loss__survival="cox", train__b=1), {}, "train.b >= 2"),
    "width": ({}, dict(feat_dim=8), "embeddings of width 8"),
    "task": ({}, dict(task="classification"), "predicts survival"),
    "bins": ({}, dict(num_classes=1), "at least 2 time bins"),
    "genes": ({}, dict(num_genes=5), "must sum to num_genes = 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_contradictions_are_refused(name):
    overrides, fields, message = BAD[name]
    spec = dict(feat_dim=setup.FEAT, num_classes=4, num_genes=9, task="survival", gene_groups=setup.GROUPS)
    with pytest.raises(ValueError, match=message):
        get_method("ghanet")(setup.small_config(**overrides), DataSpec(**spec | fields))


def test_missing_groups_parameters_and_modes_are_named(method, params):
    batch = setup.batch()
    without = setup.small_method(groups=())
    deployed = {k: params[k] for k in ("CAB", "HSB")}
    out = jax.jit(lambda p: without.forward(p, {}, {}, batch, None, False)[0])(deployed)
    with pytest.raises(ValueError, match="needs gene groups to reconstruct"):
        without.objective(out, batch)
    with pytest.raises(ValueError, match="parameters of 'HSB' are needed"):
        method.predict({"CAB": params["CAB"]}, {}, {}, batch, "pathology")
    with pytest.raises(ValueError, match="mode 'genomics' is not available"):
        method.predict(params, {}, {}, batch, "genomics")
    with pytest.raises(ValueError, match=r"the batch has no \['positions'\]"):
        method.predict(params, {}, {}, {k: v for k, v in batch.items() if k != "positions"}, "pathology")
