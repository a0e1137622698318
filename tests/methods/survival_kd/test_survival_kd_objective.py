"""The objective of survival distillation against float64 NumPy written from its definitions."""

import jax
import kd_setup as setup
import numpy as np
import pytest

from histokd_jax.methods.supervised.objective import COX
from histokd_jax.methods.supervised.objective import ObjectiveSpec as Supervised
from histokd_jax.methods.survival_kd import objective as objectives
from histokd_jax.methods.survival_kd.config import objective_spec
from histokd_jax.methods.survival_kd.objective import ObjectiveSpec, objective

S, C = 6, 4
RNG = np.random.default_rng(3)
STUDENT_LOGITS, TEACHER_LOGITS = RNG.normal(size=(2, S, C))
BATCH = {
    "weight": np.array([1, 1, 1, 1, 1, 0], np.float32),
    "label": np.array([0, 3, 1, 2, 1, 0], np.int32),
    "event": np.array([1, 0, 1, 0, 1, 0], np.float32),
    "time_months": np.array([3.0, 40.0, 11.0, 25.0, 12.0, 0.0], np.float32),
    "has_genes": np.array([1, 1, 0, 1, 1, 0], bool),
}
VALID, TAUGHT = [0, 1, 2, 3, 4], [0, 1, 3, 4]
SPEC = ObjectiveSpec(Supervised(), Supervised(needs_genes=True), 0.7, 0.3, 0.5, temperature=2.0, order_temperature=0.5)


def outputs(student=STUDENT_LOGITS, teacher=TEACHER_LOGITS):
    ones = np.ones((S, 3))
    named = {"student_logits": student, "student_embedding": ones, "student_l1": np.zeros(S)}
    return named | {"teacher_logits": teacher, "teacher_embedding": ones, "teacher_l1": np.zeros(S)}


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def nll(z, rows):
    h = sigmoid(z)
    curve = np.concatenate([np.ones((len(z), 1)), np.cumprod(1 - h, axis=1)], axis=1)
    each = [
        -np.log(curve[i, y]) - np.log(h[i, y]) if BATCH["event"][i] else -np.log(curve[i, y + 1])
        for i, y in enumerate(BATCH["label"])
    ]
    return np.mean([each[i] for i in rows])


def bernoulli(p, q):
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def hazard(student, teacher, rows, temperature, at_risk=True):
    kl = temperature**2 * bernoulli(sigmoid(teacher / temperature), sigmoid(student / temperature))
    return np.mean([np.mean(kl[i, : BATCH["label"][i] + 1 if at_risk else C]) for i in rows])


def times_of_death(z):
    """[S, C + 1] probability of each bin and of outliving all."""
    h = sigmoid(z)
    curve = np.concatenate([np.ones((len(z), 1)), np.cumprod(1 - h, axis=1)], axis=1)
    return np.concatenate([curve[:, :-1] * h, curve[:, -1:]], axis=1)


def event(student, teacher, rows):
    p, q = times_of_death(teacher), times_of_death(student)
    return np.mean(np.sum(p * np.log(p / q), axis=1)[rows])


def risk(z):
    return -np.cumprod(1 - sigmoid(z), axis=1).sum(axis=1)


def order(student, teacher, rows, temperature):
    top, bottom = 0.0, 0.0
    for a, i in enumerate(rows):
        for j in rows[a + 1 :]:
            d_t, d_s = teacher[i] - teacher[j], student[i] - student[j]
            top += abs(d_t) * np.log1p(np.exp(-np.sign(d_t) * d_s / temperature))
            bottom += abs(d_t)
    return top / bottom


def run(spec, out=None, batch=None, stage="online"):
    """Loss and metrics in float64."""
    with jax.enable_x64(True):
        loss, metrics = objective(spec, jax.tree.map(jax.numpy.asarray, out or outputs()), batch or BATCH, 0, stage)
        return float(loss), {k: float(v[0]) for k, v in metrics.items()}


def test_every_term_and_the_total_equal_numpy():
    loss, metrics = run(SPEC)
    expected = {
        "student_bag": nll(STUDENT_LOGITS, VALID),
        "teacher_bag": nll(TEACHER_LOGITS, TAUGHT),
        "hazard": hazard(STUDENT_LOGITS, TEACHER_LOGITS, TAUGHT, 2.0),
        "event": event(STUDENT_LOGITS, TEACHER_LOGITS, TAUGHT),
        "order": order(risk(STUDENT_LOGITS), risk(TEACHER_LOGITS), TAUGHT, 0.5),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-9, err_msg=name)
    weights = dict(student_bag=1, teacher_bag=1, hazard=0.7, event=0.3, order=0.5)
    np.testing.assert_allclose(loss, sum(weights[k] * v for k, v in expected.items()), rtol=1e-6)
    assert metrics["taught"] == 4


def test_stages_hold_the_terms_of_their_networks():
    found = {stage: set(run(SPEC, stage=stage)[1]) for stage in ("online", "teacher", "student")}
    terms = {"hazard", "event", "order"}
    assert terms <= found["online"] & found["student"] and not terms & found["teacher"]
    assert "teacher_bag" in found["teacher"] - found["student"] and "student_bag" in found["student"] - found["teacher"]


def test_all_bins_without_the_at_risk_mask():
    _, metrics = run(ObjectiveSpec(Supervised(), Supervised(needs_genes=True), at_risk=False))
    np.testing.assert_allclose(
        metrics["hazard"], hazard(STUDENT_LOGITS, TEACHER_LOGITS, TAUGHT, 1.0, at_risk=False), rtol=1e-9
    )


def test_cached_hazards_replace_the_teacher_network():
    spec = ObjectiveSpec(Supervised(), None, 0.7, 0.3, 0.5, 2.0, 0.5)
    out = {k: v for k, v in outputs().items() if k.startswith("student")}
    hazards = np.where(BATCH["has_genes"][:, None], sigmoid(TEACHER_LOGITS), np.nan)
    batch = {**BATCH, "teacher_hazards": hazards, "has_teacher": BATCH["has_genes"]}
    _, metrics = run(spec, out, batch, "student")
    _, expected = run(SPEC, stage="student")
    for name in ("student_bag", "hazard", "event", "order", "taught"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("cached", [False, True])
def test_gradient_reaches_the_student_only_and_never_untaught_or_empty_slots(cached):
    spec = ObjectiveSpec(SPEC.student, None if cached else SPEC.teacher, 1.0, 1.0, 1.0)
    bad = np.where(BATCH["has_genes"][:, None], TEACHER_LOGITS, np.nan)
    batch = {**BATCH, "teacher_hazards": sigmoid(bad), "has_teacher": BATCH["has_genes"]}

    def terms(student, teacher, hazards):
        found = objectives.distillation_terms(spec, outputs(student, teacher), {**batch, "teacher_hazards": hazards})
        return sum(found.values())

    grads = jax.grad(terms, (0, 1, 2))(*map(np.float32, (STUDENT_LOGITS, bad, batch["teacher_hazards"])))
    np.testing.assert_array_equal(grads[1], 0.0)
    np.testing.assert_array_equal(grads[2], 0.0)
    np.testing.assert_array_equal(np.any(grads[0] != 0, axis=1), BATCH["has_genes"])
    assert np.isfinite(grads[0]).all()


def test_saturated_cached_hazards_are_finite():
    logits = np.asarray(objectives.hazard_logits(np.float32([0.0, 1.0, 0.25])))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[2], np.log(0.25 / 0.75), rtol=1e-6)


def test_cox_heads_distil_the_order_of_log_risks():
    spec = ObjectiveSpec(
        Supervised(survival=COX), Supervised(survival=COX, needs_genes=True), 0.0, 0.0, 1.0, order_temperature=0.5
    )
    _, metrics = run(spec, outputs(STUDENT_LOGITS[:, :1], TEACHER_LOGITS[:, :1]))
    expected = order(STUDENT_LOGITS[:, 0], TEACHER_LOGITS[:, 0], TAUGHT, 0.5)
    np.testing.assert_allclose(metrics["order"], expected, rtol=1e-9)
    traced = spec.with_values({"loss.lambda_hazard": jax.numpy.float32(1.0)})
    assert set(traced.weights()) == {"order"}, "a Cox head has no hazards, whatever the weight"


def test_weights_as_data_equal_weights_as_numbers():
    values = {"loss.lambda_hazard": 0.7, "loss.lambda_event": 0.3, "loss.lambda_order": 0.5}
    values |= {"distill.temperature": 2.0, "distill.order_temperature": 0.5, "loss.alpha": 0.4, "loss.teacher_l1": 0.0}
    base = ObjectiveSpec(Supervised(), Supervised(needs_genes=True), 0.0, 0.0, 0.0)
    traced = base.with_values({key: jax.numpy.float32(value) for key, value in values.items()})
    fixed = ObjectiveSpec(Supervised(alpha=0.4), Supervised(alpha=0.4, needs_genes=True), 0.7, 0.3, 0.5, 2.0, 0.5)
    np.testing.assert_allclose(run(traced)[0], run(fixed)[0], rtol=1e-6)
    assert base.weights() == {}
    with pytest.raises(ValueError, match="cannot vary"):
        base.with_values({"train.lr": 1.0})
    with pytest.raises(ValueError, match="teacher_l1"):
        ObjectiveSpec(Supervised(), None).with_values({"loss.teacher_l1": 1.0})


def test_teacher_l1_is_the_teachers_alone():
    spec = objective_spec(setup.config(loss__teacher_l1=0.1, loss__l1=0.0))
    assert spec.teacher.l1 == 0.1 and spec.student.l1 == 0.0
