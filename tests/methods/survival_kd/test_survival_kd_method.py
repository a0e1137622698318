"""Survival distillation as a method: pairs of networks, gradients, stages, modes, bad settings."""

import functools

import jax
import jax.numpy as jnp
import kd_setup as setup
import numpy as np
import optax
import pytest

from histokd_jax.methods.registry import get_method
from histokd_jax.methods.supervised import method as supervised
from histokd_jax.methods.survival_kd.config import as_supervised, default_config, validate
from histokd_jax.methods.survival_kd.method import make_method
from histokd_jax.train.state import start_stage
from histokd_jax.train.step import make_train_step, metric_names
from histokd_jax.types import DataSpec

KEY = jax.random.key(7)
OFF = {"loss__lambda_hazard": 0.0, "loss__lambda_event": 0.0, "loss__lambda_order": 0.0}
ON = {"loss__lambda_hazard": 1.0, "loss__lambda_event": 0.5, "loss__lambda_order": 0.5}
FUSED = {"teacher__abmil__fusion": "concat"}
PAIRS = [
    ("snn", "abmil", {}),
    ("abmil", "deepsets", FUSED),
    ("porpoise_mmf", "clam_sb", {}),
    ("mcat", "dsmil", {}),
    ("survpath", "transmil", {}),
    ("snn", "clam_mb", {}),
]


@functools.cache
def gradients_of(stage, teacher="snn", student="abmil", **overrides):
    """(loss, gradients) of one step with dropout; patient 2 has no genes."""
    method, batch = setup.method(teacher, student, **overrides), setup.batch(lacking=(2,))
    params, extra = jax.jit(method.init)(KEY)

    def loss(params):
        outputs, _ = method.forward(params, {}, extra, batch, jax.random.key(1), True, stage=stage)
        return method.objective(outputs, batch, 0, stage)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def largest(tree):
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "teacher,student,options", [*PAIRS[:2], *(pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS[2:])]
)
def test_any_pair_trains_and_deploys_both_networks(teacher, student, options):
    value, grads = gradients_of("online", teacher, student, **options, **ON)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert largest(grads["student"]) > 0 and largest(grads["teacher"]) > 0
    method = setup.method(teacher, student, **options)
    assert [m.name for m in method.modes] == ["pathology", "genomics" if teacher == "snn" else "both"]
    params, batch = jax.jit(method.init)(KEY)[0], setup.batch()
    for mode in method.modes:
        own = {name: params[name] for name in mode.params}
        out = method.predict(own, {}, {}, {name: batch[name] for name in mode.fields}, mode.name)
        assert out["hazards"].shape == (4, 4) and out["risk"].shape == (4,)


def test_gradient_of_the_student_terms_does_not_reach_the_teacher():
    """Online: the teacher's gradient is that of its own loss, bit for bit; in the student's stage it is 0."""
    _, on = gradients_of("online", **ON)
    _, off = gradients_of("online", **OFF)
    jax.tree.map(np.testing.assert_array_equal, on["teacher"], off["teacher"])
    assert largest(jax.tree.map(jnp.subtract, on["student"], off["student"])) > 0
    _, alone = gradients_of("student", **ON)
    assert largest(alone["teacher"]) == 0 and largest(alone["student"]) > 0
    _, first = gradients_of("teacher", **ON)
    assert largest(first["student"]) == 0 and largest(first["teacher"]) > 0


def two_steps(method, stage, batch):
    tx = optax.scale_by_adam()
    step = jax.jit(make_train_step(method, tx, stage))
    params, extra = jax.jit(method.init)(KEY)
    names = metric_names(method, stage, params, extra, batch)
    state = start_stage(params, extra, jax.random.key(3), tx, names)
    for _ in range(2):
        state, _ = step(state, batch, jnp.float32(1e-3))
    return state.params


@pytest.mark.parametrize(
    "teacher,student", [pytest.param("snn", "clam_sb", marks=pytest.mark.slow), ("porpoise_mmf", "abmil")]
)
def test_with_all_weights_0_the_student_is_the_supervised_network(teacher, student):
    """Same parameters after two steps with dropout; with weights on they differ."""
    batch = setup.batch(lacking=(1,))
    plain = supervised.make_method(as_supervised(setup.config(student=student), "student"), setup.DATA)
    expected = two_steps(plain, "supervised", batch)["network"]
    found = two_steps(setup.method(teacher, student, **OFF), "online", batch)["student"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)
    taught = two_steps(setup.method(teacher, student, **ON), "online", batch)["student"]
    assert largest(jax.tree.map(jnp.subtract, taught, expected)) > 1e-4


def test_the_control_draws_the_same_masks():
    """Outputs of both networks in training mode do not depend on the weights."""
    batch, outputs = setup.batch(), []
    for weights in (ON, OFF):
        method = setup.method("porpoise_mmf", **weights)
        params = jax.jit(method.init)(KEY)[0]
        outputs.append(jax.jit(lambda p, m=method: m.forward(p, {}, {}, batch, KEY, True)[0])(params))
    jax.tree.map(np.testing.assert_array_equal, *outputs)


def test_a_frozen_teacher_draws_no_dropout():
    method, batch = setup.method("porpoise_mmf"), setup.batch()
    params = jax.jit(method.init)(KEY)[0]
    run = jax.jit(lambda key, train: method.forward(params, {}, {}, batch, key, train, "student")[0], static_argnums=1)
    trained, quiet = run(KEY, True), run(KEY, False)
    np.testing.assert_array_equal(trained["teacher_logits"], quiet["teacher_logits"])
    assert largest(trained["student_logits"] - quiet["student_logits"]) > 0


def test_pathology_needs_neither_genes_nor_teacher():
    method, batch = setup.method("mcat"), setup.batch()
    params = jax.jit(method.init)(KEY)[0]
    without = {k: v for k, v in batch.items() if k not in ("genes", "has_genes", "label", "time_months", "event")}
    noise = {**batch, "genes": np.full_like(batch["genes"], np.nan)}
    alone = method.predict({"student": params["student"]}, {}, {}, without, "pathology")
    both = method.predict(params, {}, {}, noise, "pathology")
    jax.tree.map(np.testing.assert_array_equal, alone, both)
    weights = method.attention({"student": params["student"]}, {}, {}, without, "pathology")
    np.testing.assert_allclose(weights.sum(), len(setup.small.SIZES), rtol=1e-5)
    with pytest.raises(ValueError, match="'teacher' are needed but absent"):
        method.predict({"student": params["student"]}, {}, {}, batch, "both")
    with pytest.raises(ValueError, match=r"'genomics' is not available.*pathology.*both"):
        method.predict(params, {}, {}, batch, "genomics")


def test_stages_and_fields_of_every_schedule():
    stages = {s: setup.method(distill__schedule=s, distill__table="t.csv") for s in ("online", "two_stage", "cached")}
    trainable = {name: [(s.name, s.trainable) for s in method.stages] for name, method in stages.items()}
    assert trainable == {
        "online": [("online", ("student", "teacher"))],
        "two_stage": [("teacher", ("teacher",)), ("student", ("student",))],
        "cached": [("student", ("student",))],
    }
    assert "genes" in stages["online"].requires and "genes" not in stages["cached"].requires
    assert {"teacher_hazards", "has_teacher"} <= set(stages["cached"].requires)
    assert list(jax.eval_shape(stages["cached"].init, KEY)[0]) == ["student"]
    assert [m.name for m in stages["cached"].modes] == ["pathology"]


def test_cached_hazards_teach_as_the_frozen_teacher_they_come_from():
    """Loss and gradient of the student's stage, dropout off, patient 2 without a teacher."""
    batch = setup.batch(lacking=(2,))
    live, cached = (setup.method(distill__schedule=s, distill__table="t.csv", **ON) for s in ("two_stage", "cached"))
    params = jax.jit(live.init)(KEY)[0]
    hazards = live.predict(params, {}, {}, batch, "genomics")["hazards"]
    batch |= {"teacher_hazards": np.asarray(hazards), "has_teacher": batch["has_genes"]}
    found = []
    for method in (live, cached):

        def loss(student, method=method):
            own = {**params, "student": student} if method is live else {"student": student}
            outputs, _ = method.forward(own, {}, {}, batch, None, False, stage="student")
            return method.objective(outputs, batch, 0, "student")[0]

        found.append(jax.jit(jax.value_and_grad(loss))(params["student"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *found)


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"student__name": "abmill"}, "student.name = 'abmill' is unknown.*abmil"),
        ({"teacher__name": "resnet"}, "teacher.name = 'resnet' is unknown"),
        ({"student__name": "snn"}, "student.name = 'snn'.*slides only"),
        ({"student__name": "mcat"}, "student.name = 'mcat'.*reads patches, genes"),
        ({"student__abmil__fusion": "concat"}, r"student\.abmil\.fusion = 'none'"),
        ({"teacher__name": "abmil"}, r"teacher\.name = 'abmil'.*teacher\.abmil\.fusion"),
        ({"teacher__snn__dropout": 1.0}, "teacher.snn.dropout = 1.0"),
        ({"loss__teacher_l1": -1.0}, "loss.teacher_l1 = -1.0"),
        ({"loss__lambda_event": -0.5}, "loss.lambda_event = -0.5"),
        ({"distill__temperature": 0.0}, "distill.temperature = 0.0"),
        ({"distill__schedule": "offline"}, "distill.schedule = 'offline'.*two_stage"),
        ({"distill__schedule": "cached"}, "distill.table = FILE"),
        ({"loss__survival": "cox"}, r"loss\.lambda_hazard = 1\.0.*'cox' has none"),
        ({"loss__lambda_order": 1.0, "train__b": 1}, "train.b = 1.*pairs"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        validate(setup.config(**overrides))


def test_bad_data_are_named():
    with pytest.raises(ValueError, match="distils survival models, not task 'classification'"):
        make_method(setup.config(), DataSpec(6, 4, 10))
    with pytest.raises(ValueError, match="teacher.name = 'snn'.*molecular features"):
        make_method(setup.config(), DataSpec(6, 4, 0, "survival"))
    cfg = setup.config()
    cfg.infer = dict(mode="both")
    with pytest.raises(ValueError, match=r"infer\.mode = 'both'.*genomics"):
        make_method(cfg, setup.DATA)
    del cfg.student["abmil"]
    with pytest.raises(ValueError, match=r"student\.abmil"):
        validate(cfg)


def test_cox_pair_trains_by_order():
    options = {**OFF, "loss__survival": "cox", "loss__lambda_order": 1.0}
    value, grads = gradients_of("online", **options)
    assert np.isfinite(value) and largest(grads["student"]) > 0
    method = setup.method(**options)
    out = method.predict(jax.jit(method.init)(KEY)[0], {}, {}, setup.batch(), "pathology")
    assert out["hazards"].shape == (4, 0) and out["risk"].shape == (4,)


def test_the_registry_finds_it():
    method = get_method("survival_kd")(default_config(), DataSpec(1024, 4, 20, "survival"))
    assert method.name == "survival_kd" and method.batch_coupled
