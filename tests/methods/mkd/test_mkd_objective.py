"""Composition of the objective: stages, absent teachers, masks, zero weights; checks C7, C8, D4 and E."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import mkd_setup as setup
import numpy as np
import pytest

from histokd_jax import losses
from histokd_jax.methods.mkd.objective import TRACED, ObjectiveSpec, loss_terms, objective

SLOTS = 4


def outputs(seed=0, slots=SLOTS):
    rng = np.random.default_rng(seed)
    out = {n: rng.normal(size=(slots, 5)).astype(np.float32) for n in "PMG"}
    return out | {f"z_{n}": rng.normal(size=(slots, 2)).astype(np.float32) for n in "PMG"}


def step_batch(slots=SLOTS, **fields):
    return {"weight": np.ones(slots, np.float32), "label": np.arange(slots) % 2} | fields


def test_total_is_the_weighted_sum_of_the_reported_terms():
    spec = ObjectiveSpec(lambda_coral=2.0, lambda_or=3.0, lambda_skd=0.5, lambda_clod=0.25)
    total, metrics = objective(spec, outputs(), step_batch())
    terms = {k: float(v[0] / v[1]) for k, v in metrics.items()}
    expected = terms["ce_p"] + terms["ce_m"] + terms["ce_g"]
    expected += 2 * terms["coral"] + 3 * terms["or"] + 0.5 * terms["skd"] + 0.25 * terms["clod"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(terms["loss"], total, rtol=1e-6)


def test_metrics_report_norms_and_accuracies_per_slide():
    out, batch = outputs(), step_batch()
    _, metrics = objective(ObjectiveSpec(), out, batch)
    for n in "PMG":
        total, count = metrics[f"norm_{n.lower()}"]
        np.testing.assert_allclose(total, np.linalg.norm(out[n], axis=1).sum(), rtol=1e-6)
        right, slides = metrics[f"acc_{n.lower()}"]
        assert right == (out[f"z_{n}"].argmax(1) == batch["label"]).sum() and count == slides == SLOTS


def test_zero_weight_removes_the_term_from_the_graph():
    spec = ObjectiveSpec(lambda_skd=0.0, lambda_clod=0.0, lambda_or=0.0, lambda_coral=0.0)
    assert set(loss_terms(spec, outputs(), step_batch())) == {"ce_p", "ce_m", "ce_g"}
    text = str(jax.make_jaxpr(lambda out: objective(spec, out, step_batch())[0])(outputs()))
    with_skd = str(jax.make_jaxpr(lambda out: objective(ObjectiveSpec(), out, step_batch())[0])(outputs()))
    assert text.count("dot_general") == 0 < with_skd.count("dot_general")


@pytest.mark.parametrize("off", ["coral", "or", "skd", "clod"])
@pytest.mark.parametrize("zero_rows", [False, True])
def test_traced_weight_0_equals_the_term_removed_in_value_and_gradient(off, zero_rows):
    out = {name: np.zeros_like(x) if zero_rows else x for name, x in outputs().items()}
    spec = ObjectiveSpec(lambda_coral=2.0, alpha=0.5, temperature=2.0)
    removed = dataclasses.replace(spec, **{f"lambda_{off}": 0.0})
    values = {key: jnp.float32(getattr(removed, field)) for key, field in TRACED.items()}

    def traced(out, values):
        return objective(ObjectiveSpec().with_values(values), out, step_batch())[0]

    ours = jax.jit(jax.value_and_grad(traced))(out, values)
    theirs = jax.jit(jax.value_and_grad(lambda out: objective(removed, out, step_batch())[0]))(out)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_only_numbers_of_the_objective_can_be_data():
    with pytest.raises(ValueError, match="'skd.scale'.*cannot vary"):
        ObjectiveSpec().with_values({"skd.scale": jnp.ones(())})


def test_skd_scale():
    ours = {s: loss_terms(ObjectiveSpec(skd_scale=s), outputs(), step_batch())["skd"] for s in ("b", "1")}
    np.testing.assert_allclose(ours["b"], SLOTS * ours["1"], rtol=1e-6)


@pytest.mark.parametrize("name", ["rkd", "pkt", "fitnet", "infonce"])
def test_inter_loss_replaces_skd(name):
    out = outputs()
    fn = getattr(losses, f"{name}_loss")
    term = loss_terms(ObjectiveSpec(inter_loss=name), out, step_batch())["skd"]
    np.testing.assert_allclose(term, fn(out["P"], out["M"]) + fn(out["P"], out["G"]), rtol=1e-6)


def test_inter_loss_none():
    assert "skd" not in loss_terms(ObjectiveSpec(inter_loss="none"), outputs(), step_batch())


@pytest.mark.parametrize("teacher,other", [("M", "G"), ("G", "M")])
def test_absent_teacher_drops_every_pair_that_names_it(teacher, other):
    out = {k: v for k, v in outputs().items() if other not in k}
    terms = loss_terms(ObjectiveSpec(teachers=(teacher,)), out, step_batch())
    assert set(terms) == {"ce_p", f"ce_{teacher.lower()}", "coral", "or", "skd", "clod"}
    p, t = out["P"], out[teacher]
    np.testing.assert_allclose(terms["coral"], losses.coral_loss(p, t), rtol=1e-6)
    np.testing.assert_allclose(terms["or"], losses.orth_loss(p, t), rtol=1e-6)
    np.testing.assert_allclose(terms["skd"], SLOTS * losses.sp_loss(p, t), rtol=1e-6)


def test_no_teachers_is_plain_supervision():
    out = {k: v for k, v in outputs().items() if "P" in k}
    assert set(loss_terms(ObjectiveSpec(teachers=()), out, step_batch())) == {"ce_p"}


def test_empty_slots_equal_a_smaller_step():
    """Two empty slots full of NaN: same terms, same gradient, zero gradient in the empty slots."""
    full = outputs()
    dirty = {k: np.concatenate([v, np.full((2, v.shape[1]), np.nan, np.float32)]) for k, v in full.items()}
    weight = np.array([1, 1, 1, 1, 0, 0], np.float32)
    batch = step_batch(6) | {"weight": weight}
    loss, grads = jax.jit(jax.value_and_grad(lambda out: objective(ObjectiveSpec(), out, batch)[0]))(dirty)
    expected, expected_grads = jax.value_and_grad(lambda out: objective(ObjectiveSpec(), out, step_batch())[0])(full)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for k, g in grads.items():
        np.testing.assert_allclose(g[:4], expected_grads[k], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(g[4:], 0.0)


def test_slides_without_genes_train_the_student_only():
    batch = step_batch(has_genes=np.array([True, True, False, True]))
    grads = jax.grad(lambda out: objective(ObjectiveSpec(), out, batch)[0])(outputs())
    assert np.abs(grads["z_P"][2]).max() > 0
    for k in ("P", "M", "G", "z_M", "z_G"):
        np.testing.assert_array_equal(grads[k][2], 0.0)


def test_check_C7_single_slot_raises():
    with pytest.raises(ValueError, match="b >= 2"):
        objective(ObjectiveSpec(), outputs(slots=1), step_batch(1))


def test_single_slot_is_fine_without_coupled_terms():
    spec = ObjectiveSpec(lambda_coral=0.0, lambda_or=0.0, lambda_skd=0.0)
    assert np.isfinite(objective(spec, outputs(slots=1), step_batch(1))[0])


def test_check_C8_multimodal_and_student_products_are_non_negative():
    method = setup.small_method()

    @jax.jit
    def products(key, batch):
        params, _ = method.init(key)
        out, _ = method.forward(params, {}, {}, batch, key, True)
        return jnp.sum(out["P"] * out["M"], axis=1)

    for seed in range(5):
        assert np.all(products(jax.random.key(seed), setup.batch(seed=seed)) >= 0)


def test_check_D4_clod_couples_no_teachers():
    spec = ObjectiveSpec(lambda_coral=0.0, lambda_or=0.0, lambda_skd=0.0)
    out = outputs()
    moved = out | {"z_M": out["z_M"] + np.array([[3.0, -1.0]], np.float32)}
    grad = jax.grad(lambda o: loss_terms(spec, o, step_batch())["clod"])
    np.testing.assert_array_equal(grad(out)["z_G"], grad(moved)["z_G"])
    assert np.abs(grad(out)["z_P"] - grad(moved)["z_P"]).max() > 1e-3


# Which networks' encoder and head each term trains: table 5.6 of the specification.
REACH = {
    "ce_p": {"S_P enc", "S_P head"},
    "ce_m": {"T_M enc", "T_M head"},
    "ce_g": {"T_G enc", "T_G head"},
    "coral": {"S_P enc", "T_M enc", "T_G enc"},
    "or": {"S_P enc", "T_M enc", "T_G enc"},
    "skd": {"S_P enc", "T_M enc", "T_G enc"},
    "KL(P<-M)": {"S_P enc", "S_P head"},
    "KL(P<-G)": {"S_P enc", "S_P head"},
    "KL(M<-P)": {"T_M enc", "T_M head"},
    "KL(G<-P)": {"T_G enc", "T_G head"},
}


def term_value(name, out, batch):
    if name.startswith("KL"):
        return losses.mutual_kl(out[f"z_{name[3]}"], out[f"z_{name[6]}"], 4.0)
    return loss_terms(ObjectiveSpec(), out, batch)[name]


def reached(grads):
    parts = {}
    for network, tree in grads.items():
        head = jax.tree.leaves(tree["head"])
        encoder = jax.tree.leaves({k: v for k, v in tree.items() if k != "head"})
        parts |= {f"{network} head": head, f"{network} enc": encoder}
    return {k for k, leaves in parts.items() if any(np.any(np.asarray(g) != 0) for g in leaves)}


@pytest.fixture(scope="module")
def reach():
    """term -> parts with a gradient that is not exactly zero."""
    method, batch = setup.small_method(), setup.batch()
    params, _ = method.init(jax.random.key(3))

    def terms(params):
        out, _ = method.forward(params, {}, {}, batch, None, False)
        return jnp.stack([term_value(name, out, batch) for name in REACH])

    rows = jax.jit(jax.jacrev(terms))(params)
    return {name: reached(jax.tree.map(operator.itemgetter(i), rows)) for i, name in enumerate(REACH)}


@pytest.mark.parametrize("term", REACH)
def test_check_E_gradient_reach(reach, term):
    assert reach[term] == REACH[term]


def test_check_E_absent_teacher_has_no_parameters():
    method = setup.small_method(teachers=("M",))
    params, _ = method.init(jax.random.key(0))
    assert set(params) == {"S_P", "T_M"}
    out, _ = method.forward(params, {}, {}, setup.batch(), jax.random.key(0), True)
    assert set(out) == {"P", "M", "z_P", "z_M"}


def test_stop_grad_teacher():
    spec = ObjectiveSpec(stop_grad_teacher=True)
    grads = jax.grad(lambda out: loss_terms(spec, out, step_batch())["skd"])(outputs())
    assert np.abs(grads["P"]).max() > 0
    np.testing.assert_array_equal(grads["M"], 0.0)
    np.testing.assert_array_equal(grads["G"], 0.0)


def test_two_stage_teachers_then_student():
    out, batch, spec = outputs(), step_batch(), ObjectiveSpec()
    assert set(loss_terms(spec, out, batch, "teachers")) == {"ce_m", "ce_g"}
    student = loss_terms(spec, out, batch, "student")
    assert set(student) == {"ce_p", "coral", "or", "skd", "clod"}
    p, m, g = (out[n] for n in "PMG")
    np.testing.assert_allclose(student["coral"], losses.coral_loss(p, m) + losses.coral_loss(p, g), rtol=1e-6)
    np.testing.assert_allclose(student["or"], losses.orth_loss(p, m) + losses.orth_loss(p, g), rtol=1e-6)
    to_student = losses.mutual_kl(out["z_P"], out["z_M"]) + losses.mutual_kl(out["z_P"], out["z_G"])
    np.testing.assert_allclose(student["clod"], to_student, rtol=1e-6)


def test_two_stage_student_stage_never_moves_teachers():
    grads = jax.grad(lambda out: objective(ObjectiveSpec(), out, step_batch(), stage="student")[0])(outputs())
    for k in ("M", "G", "z_M", "z_G"):
        np.testing.assert_array_equal(grads[k], 0.0)
    assert np.abs(grads["P"]).max() > 0
