"""Distillation with named terms as a method: pairs, gradients, stages, modes, bad settings."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.methods.distil import config as settings
from histokd_jax.methods.distil.method import make_method
from histokd_jax.methods.supervised import method as supervised
from histokd_jax.types import DataSpec

# The narrow networks and batches of the survival distillation tests, without making their folder importable.
_PATH = pathlib.Path(__file__).parents[1] / "survival_kd" / "kd_setup.py"
_SPEC = importlib.util.spec_from_file_location("kd_setup_of_distil", _PATH)
small = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small)

KEY = jax.random.key(7)
SURVIVAL = {"hazard": 1.0, "sp": 10.0, "fitnet": {"connector": "linear", "weight": 1.0}}
CLASSES = {"kd": 0.9, "rkd": 1.0, "vid": {"connector": "linear", "weight": 0.5}}
TASKS = {"survival": SURVIVAL, "classification": CLASSES}


def config(teacher="snn", student="abmil", terms=(), **overrides):
    cfg = settings.default_config()
    given = small.config(teacher, student).to_dict()
    for section in ("data", "teacher", "student"):
        cfg[section].update(given[section])
    cfg.train.b = 4
    cfg.terms = dict(terms)
    cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return cfg


def method(teacher="snn", student="abmil", terms=(), task="survival", **overrides):
    data = DataSpec(small.DATA.feat_dim, small.DATA.num_classes, small.DATA.num_genes, task, small.GROUPS)
    return make_method(config(teacher, student, terms, **overrides), data)


@functools.cache
def gradients_of(stage, task="survival", weight=1.0, schedule="online"):
    run = method(terms=TASKS[task], task=task, loss__lambda_terms=weight, distill__schedule=schedule)
    batch = small.batch(lacking=(2,))
    params, extra = jax.jit(run.init)(KEY)

    def loss(params):
        outputs, _ = run.forward(params, {}, extra, batch, jax.random.key(1), True, stage=stage)
        return run.objective(outputs, batch, 3, stage)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def largest(tree):
    return max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("task", ["survival", pytest.param("classification", marks=pytest.mark.slow)])
def test_terms_train_the_student_and_connectors_and_leave_the_teacher_alone(task):
    _, on = gradients_of("online", task)
    _, off = gradients_of("online", task, 0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(on)), "a slide without genes adds no NaN"
    jax.tree.map(np.testing.assert_array_equal, on["teacher"], off["teacher"])
    assert largest(jax.tree.map(jnp.subtract, on["student"], off["student"])) > 0 and largest(on["connectors"]) > 0
    assert "connectors" not in off


def test_stages_train_one_side_each():
    _, first = gradients_of("teacher", schedule="two_stage")
    _, second = gradients_of("student", schedule="two_stage")
    assert largest(first["student"]) == 0 and largest(first["teacher"]) > 0 and largest(first["connectors"]) == 0
    assert largest(second["teacher"]) == 0 and largest(second["student"]) > 0 and largest(second["connectors"]) > 0
    stages = method(terms=SURVIVAL, distill__schedule="two_stage").stages
    assert [stage.trainable for stage in stages] == [("teacher",), ("student", "connectors")]


def test_without_terms_the_student_is_the_supervised_network():
    run, batch = method(loss__lambda_terms=0.0, terms=SURVIVAL), small.batch()
    params = jax.jit(run.init)(KEY)[0]
    cfg = settings.as_supervised(config(), "student")
    plain = supervised.make_method(cfg, small.DATA)
    own = jax.jit(plain.init)(KEY)[0]
    jax.tree.map(np.testing.assert_array_equal, params["student"], own["network"])
    outputs, _ = run.forward(params, {}, {}, batch, KEY, True)
    expected, _ = plain.forward(own, {}, {}, batch, KEY, True)
    np.testing.assert_array_equal(outputs["student_logits"], expected["logits"])


def test_metrics_hold_both_values_of_every_term():
    run, batch = method(terms=SURVIVAL), small.batch(lacking=(1,))
    params, _ = jax.jit(run.init)(KEY)
    outputs, _ = run.forward(params, {}, {}, batch, None, False)
    assert all(value.shape[0] == batch["weight"].shape[0] for value in outputs.values()), "slot-major"
    total, metrics = run.objective(outputs, batch, 0, "online")
    assert {"hazard", "weighted_hazard", "sp", "weighted_sp", "student_bag", "teacher_bag", "taught"} <= set(metrics)
    np.testing.assert_allclose(metrics["weighted_sp"][0], 10.0 * metrics["sp"][0], rtol=1e-6)
    parts = [metrics[name][0] for name in ("student_loss", "teacher_loss")]
    parts += [metrics[f"weighted_{name}"][0] for name in SURVIVAL]
    np.testing.assert_allclose(total, sum(parts), rtol=1e-5)
    assert metrics["taught"] == (3.0, 4.0)


def test_weights_as_data_equal_weights_as_constants():
    batch = small.batch()
    run, other = method(terms=SURVIVAL), method(terms={**SURVIVAL, "sp": 40.0}, loss__own_weight=0.5)
    params, _ = jax.jit(run.init)(KEY)
    outputs, _ = run.forward(params, {}, {}, batch, None, False)
    traced = {"terms.sp.weight": jnp.asarray(40.0), "loss.own_weight": jnp.asarray(0.5)}
    assert set(traced) <= set(run.traced)
    found = run.objective(outputs, batch, 0, "online", values=traced)[0]
    np.testing.assert_allclose(found, other.objective(outputs, batch, 0, "online")[0], rtol=1e-6)


def test_the_student_is_deployed_without_teacher_connectors_and_genes():
    run, batch = method(terms=CLASSES, task="classification"), small.batch()
    params = jax.jit(run.init)(KEY)[0]
    mode = run.modes[0]
    assert mode.name == "pathology" and mode.params == ("student",) and "genes" not in mode.fields
    given = {name: batch[name] for name in mode.fields}
    out = run.predict({"student": params["student"]}, {}, {}, given, "pathology")
    np.testing.assert_allclose(out["prob"].sum(-1), 1.0, rtol=1e-5)
    assert method("abmil", "deepsets").modes[1].name == "teacher", "a teacher that reads slides alone"


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("porpoise_mmf", "clam_sb"), ("mcat", "dsmil"), ("survpath", "transmil")])
def test_any_pair_takes_any_terms(pair):
    run, batch = method(*pair, terms=SURVIVAL), small.batch()
    params, extra = jax.jit(run.init)(KEY)
    outputs, _ = jax.jit(lambda p: run.forward(p, {}, extra, batch, KEY, True))(params)
    assert np.isfinite(run.objective(outputs, batch, 0, "online")[0])


ERRORS = {
    "unknown term": (dict(terms={"hazzard": 1.0}), "'hazzard' is unknown; did you mean 'hazard'"),
    "no connector": (dict(terms={"fitnet": 1.0}, student="deepsets"), "widths .* differ; set terms.fitnet.connector"),
    "memory": (dict(terms={"crd": {"connector": "linear", "width": 4}}), "terms.crd cannot distil slide networks"),
    "softmax": (dict(terms={"kd": 1.0}), "terms.kd distils class probabilities, and a survival network has hazards"),
    "hazards": (dict(terms={"hazard": 1.0}, task="classification"), "terms.hazard distils hazards, and the task is"),
    "cox": (dict(terms={"hazard": 1.0}, loss__survival="cox"), "loss.survival = 'cox' has none: use terms on embed"),
    "schedule": (dict(distill__schedule="later"), "distill.schedule = 'later' is not possible"),
    "one slide": (dict(terms={"sp": 1.0}, train__b=1), "terms.sp couples the slides of a step"),
    "student": (dict(student="snn"), "a student reads slides only"),
    "mutual": (dict(terms={"dml": 1.0}, distill__schedule="two_stage"), "train online, or use 'kd'"),
    "network": (dict(student="resnet"), "student.name"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_settings_are_refused_by_name(case):
    given, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        method(**given)
