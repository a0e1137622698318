"""MKD as a Method: step semantics, deployment modes, stages; checks I and K of the specification."""

import jax
import jax.numpy as jnp
import mkd_setup as setup
import numpy as np
import optax
import pytest

from histokd_jax import losses

MODES = ("pathology", "both", "genomics")


@pytest.fixture(scope="module")
def method():
    return setup.small_method()


@pytest.fixture(scope="module")
def params(method):
    return jax.jit(method.init)(jax.random.key(0))[0]


def step_loss(method, batch, key=None, train=False):
    def loss(params):
        out, _ = method.forward(params, {}, {}, batch, key, train)
        return method.objective(out, batch, 0, "online")[0]

    return loss


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def one_bag(i):
    patches = setup.bags()[i]
    full = setup.slot_fields(len(setup.SIZES))
    return setup.padded([patches]) | {k: v[i : i + 1] for k, v in full.items()}


def bag_by_bag_loss(method):
    """Mean of per-bag cross entropies plus the distillation terms on stacked outputs (section 6)."""
    full = setup.slot_fields(len(setup.SIZES))

    def loss(params):
        outs = [method.forward(params, {}, {}, one_bag(i), None, False)[0] for i in range(len(setup.SIZES))]
        p, m, g, zp, zm, zg = (jnp.concatenate([o[k] for o in outs]) for k in ("P", "M", "G", "z_P", "z_M", "z_G"))
        ce = sum(jnp.mean(losses.cross_entropy(z, full["label"])) for z in (zp, zm, zg))
        coral = losses.coral_loss(m, p) + losses.coral_loss(g, p) + losses.coral_loss(g, m)
        skd = len(outs) * (losses.sp_loss(p, m) + losses.sp_loss(p, g))
        clod = sum(losses.mutual_kl(*pair) for pair in ((zp, zm), (zm, zp), (zp, zg), (zg, zp)))
        return ce + coral + losses.orth_loss(p, m, g) + skd + clod

    return loss


@pytest.fixture(scope="module")
def bag_by_bag(method, params):
    return jax.jit(jax.value_and_grad(bag_by_bag_loss(method)))(params)


@pytest.mark.parametrize("layout", [setup.packed, setup.padded], ids=["packed", "padded"])
def test_check_I1_step_gradient_equals_bag_by_bag(method, params, bag_by_bag, layout):
    value, grads = jax.jit(jax.value_and_grad(step_loss(method, setup.batch(layout))))(params)
    expected, expected_grads = bag_by_bag
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_trees_close(grads, expected_grads)


def test_check_I2_gradient_with_dropout_does_not_depend_on_layout(method, params):
    key = jax.random.key(4)
    packed, padded = (
        jax.jit(jax.grad(step_loss(method, setup.batch(layout), key, True)))(params)
        for layout in (setup.packed, setup.padded)
    )
    assert_trees_close(packed, padded)
    without = jax.jit(jax.grad(step_loss(method, setup.batch())))(params)
    assert np.abs(packed["T_M"]["head"]["kernel"] - without["T_M"]["head"]["kernel"]).max() > 1e-4


def test_check_I3_every_network_gets_a_gradient(method, params):
    grads = jax.jit(jax.grad(step_loss(method, setup.batch(), jax.random.key(1), True)))(params)
    for network in ("S_P", "T_M", "T_G"):
        assert optax.tree.norm(grads[network]) > 1e-3


NO_DISTILLATION = {f"loss__lambda_{k}": 0.0 for k in ("coral", "or", "skd", "clod")}


def train(method, steps=10):
    params, _ = jax.jit(method.init)(jax.random.key(7))
    tx = optax.adamw(2e-3)

    @jax.jit
    def step(params, state, i):
        loss = step_loss(method, setup.batch(), jax.random.fold_in(jax.random.key(8), i), True)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, i)
    return params


def without_score_bias(tree):
    """A bias added to all attention scores has zero true gradient, which Adam turns into steps of pure rounding."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "'score'" in str(path) and "'bias'" in str(path) else x, tree
    )


def test_check_I4_without_distillation_networks_train_separately():
    joint = train(setup.small_method(**NO_DISTILLATION))
    for teachers in ((), ("M",), ("G",)):
        alone = train(setup.small_method(teachers=teachers, **NO_DISTILLATION))
        assert_trees_close(
            *(without_score_bias(t) for t in ({k: joint[k] for k in alone}, alone)), rtol=1e-4, atol=1e-5
        )


def test_modes_name_parameters_and_fields(method):
    by_name = {m.name: m for m in method.modes}
    assert {n: m.params for n, m in by_name.items()} == {"pathology": ("S_P",), "both": ("T_M",), "genomics": ("T_G",)}
    assert "genes" not in by_name["pathology"].fields and "patches" not in by_name["genomics"].fields


@pytest.mark.parametrize("name", MODES)
def test_predict_needs_only_what_its_mode_names(method, params, name):
    mode, batch = method.mode(name), setup.batch()
    full = method.predict(params, {}, {}, batch, name)
    least = method.predict({k: params[k] for k in mode.params}, {}, {}, {k: batch[k] for k in mode.fields}, name)
    for k in full:
        np.testing.assert_array_equal(full[k], least[k])
    np.testing.assert_allclose(full["prob"].sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(full["prob"], jax.nn.softmax(full["logits"]), rtol=1e-6)


def test_check_K1_pathology_mode_ignores_genes(method, params):
    batch = setup.batch()
    base = method.predict(params, {}, {}, batch, "pathology")
    noisy = method.predict(params, {}, {}, batch | {"genes": np.full_like(batch["genes"], np.nan)}, "pathology")
    np.testing.assert_array_equal(base["prob"], noisy["prob"])
    bare = {k: v for k, v in batch.items() if k not in ("genes", "cnv", "label")}
    alone = method.predict({"S_P": params["S_P"]}, {}, {}, bare, "pathology")
    np.testing.assert_array_equal(base["prob"], alone["prob"])


@pytest.mark.parametrize("name", MODES)
def test_check_K2_prediction_is_deterministic(method, params, name):
    a, b = (method.predict(params, {}, {}, setup.batch(), name)["prob"] for _ in range(2))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", MODES)
def test_check_K3_prediction_does_not_depend_on_batch_size(method, params, name):
    together = method.predict(params, {}, {}, setup.batch(), name)["prob"]
    apart = [method.predict(params, {}, {}, one_bag(i), name)["prob"] for i in range(len(setup.SIZES))]
    np.testing.assert_allclose(together, np.concatenate(apart), rtol=1e-5)


def test_teacher_dropout_in_validation_leaves_the_student_alone(method, params):
    key, batch = jax.random.key(2), setup.batch()
    quiet = {m: method.predict(params, {}, {}, batch, m)["prob"] for m in MODES}
    noisy = {m: method.predict(params, {}, {}, batch, m, key)["prob"] for m in MODES}
    np.testing.assert_array_equal(quiet["pathology"], noisy["pathology"])
    for m in ("both", "genomics"):
        assert np.abs(quiet[m] - noisy[m]).max() > 1e-5


def test_ensemble_averages_probabilities_of_all_networks(method, params):
    mean = setup.small_method(infer__ensemble="mean_prob")
    assert mean.mode("both").params == ("S_P", "T_M", "T_G") and mean.mode("pathology").params == ("S_P",)
    batch = setup.batch()
    single = [method.predict(params, {}, {}, batch, m)["prob"] for m in MODES]
    out = mean.predict(params, {}, {}, batch, "both")
    np.testing.assert_allclose(out["prob"], np.mean(single, axis=0), rtol=1e-5)
    np.testing.assert_allclose(jax.nn.softmax(out["logits"]), out["prob"], rtol=1e-5)


def test_unavailable_mode_and_absent_parameters_are_named(params):
    method = setup.small_method(teachers=("M",))
    assert [m.name for m in method.modes] == ["pathology", "both"]
    with pytest.raises(ValueError, match="genomics"):
        method.predict(params, {}, {}, setup.batch(), "genomics")
    with pytest.raises(ValueError, match="T_M"):
        method.predict({"S_P": params["S_P"]}, {}, {}, setup.batch(), "both")
    with pytest.raises(ValueError, match="genes"):
        method.predict(params, {}, {}, {k: v for k, v in setup.batch().items() if k != "genes"}, "both")


def test_genomics_mode_has_no_attention_map(method, params):
    with pytest.raises(ValueError, match="no attention map"):
        method.attention(params, {}, {}, setup.batch(), "genomics")


def test_online_stage_trains_everything(method):
    (stage,) = method.stages
    assert (stage.name, stage.trainable, stage.monitor_modes) == ("online", ("S_P", "T_M", "T_G"), MODES)
    (student_monitor,) = setup.small_method(early_stop__monitor="student_auc").stages
    assert student_monitor.monitor_modes == ("pathology",)


def test_two_stage_schedule():
    teachers, student = setup.small_method(distill__schedule="two_stage").stages
    assert (teachers.name, teachers.trainable, teachers.monitor_modes) == ("teachers", ("T_M", "T_G"), MODES[1:])
    assert (student.name, student.trainable, student.monitor_modes) == ("student", ("S_P",), ("pathology",))


def test_frozen_teachers_run_without_dropout(method, params):
    batch, key = setup.batch(), jax.random.key(0)
    out, _ = method.forward(params, {}, {}, batch, key, True, stage="student")
    quiet, _ = method.forward(params, {}, {}, batch, None, False)
    for k in ("M", "z_M", "G", "z_G"):
        np.testing.assert_array_equal(out[k], quiet[k])
    assert np.abs(out["z_P"] - quiet["z_P"]).max() > 1e-4


def test_missing_genes_do_not_leak(method, params):
    """NaN genes of a slide without genes reach no gradient."""
    batch = setup.batch()
    batch["has_genes"] = np.array([True, False, True, True])
    batch["genes"][1] = np.nan
    grads = jax.jit(jax.grad(step_loss(method, batch)))(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_method_requires_both_gene_streams_only_in_gmkdn(method):
    assert "genes" in method.requires and "cnv" not in method.requires and method.batch_coupled
    assert "cnv" in setup.small_method(variant="gmkdn").requires
    assert "genes" not in setup.small_method(teachers=(), **NO_DISTILLATION).requires
