"""The supervised baselines as a Method: modes, predictions, masks, and refused configurations."""

import drawn
import jax
import numpy as np
import pytest
import supervised_setup as setup

from histokd_jax.losses.survival import risk_score
from histokd_jax.methods.registry import get_method
from histokd_jax.methods.supervised.config import default_config, validate
from histokd_jax.methods.supervised.method import make_method
from histokd_jax.types import DataSpec

FUSED = {"model__abmil__fusion": "concat"}


def made(name="abmil", task="survival", **overrides):
    method = setup.small_method(name, task, **overrides)
    return method, drawn.variables(method.init, jax.random.key(0))[0]


@pytest.mark.parametrize(
    "name,overrides,mode,fields",
    [
        ("abmil", {}, "pathology", {"patches", "segment_ids", "positions"}),
        ("deepattnmisl", {}, "pathology", {"patches", "segment_ids", "positions", "clusters"}),
        ("snn", {}, "genomics", {"genes"}),
        ("abmil", FUSED, "both", {"patches", "segment_ids", "positions", "genes"}),
    ],
)
def test_one_mode_named_after_what_the_network_reads(name, overrides, mode, fields):
    method, params = made(name, **overrides)
    (only,) = method.modes
    assert (only.name, only.params, set(only.fields)) == (mode, ("network",), {"weight", *fields})
    assert set(method.requires) == {"weight", "label", "time_months", "event", *fields}
    (stage,) = method.stages
    assert stage.trainable == ("network",) and stage.monitor_modes == (mode,) and method.batch_coupled
    batch = setup.batch()
    least = method.predict(params, {}, {}, {k: batch[k] for k in only.fields}, mode)
    np.testing.assert_array_equal(least["logits"], method.predict(params, {}, {}, batch, mode)["logits"])


def test_survival_predictions():
    method, params = made()
    out = method.predict(params, {}, {}, setup.batch(), "pathology")
    assert set(out) == {"risk", "hazards", "logits", "embedding"}
    np.testing.assert_allclose(out["hazards"], jax.nn.sigmoid(out["logits"]), rtol=1e-6)
    curve = np.cumprod(1 - np.asarray(out["hazards"], np.float64), axis=1)
    np.testing.assert_allclose(out["risk"], -curve.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(out["risk"], risk_score(out["logits"]), rtol=1e-6)


def test_cox_head_predicts_one_log_risk_and_no_hazards():
    method, params = made(loss__survival="cox")
    out = method.predict(params, {}, {}, setup.batch(), "pathology")
    assert out["logits"].shape == (4, 1) and out["hazards"].shape == (4, 0)
    np.testing.assert_array_equal(out["risk"], out["logits"][:, 0])


def test_classification_predictions():
    method, params = made(task="classification")
    out = method.predict(params, {}, {}, setup.batch(), "pathology")
    assert set(out) == {"prob", "logits", "embedding"} and "event" not in method.requires
    np.testing.assert_allclose(out["prob"], jax.nn.softmax(out["logits"]), rtol=1e-6)


def test_dsmil_probabilities_are_sigmoids_or_their_average():
    batch, outs = setup.batch(), []
    for average in (False, True):
        method, params = made("dsmil", "classification", loss__classification="bce", infer__average_max=average)
        outs.append(method.predict(params, {}, {}, batch, "pathology"))
    raw, _ = method.forward(params, {}, {}, batch, None, False)
    np.testing.assert_allclose(outs[0]["prob"], jax.nn.sigmoid(raw["logits"]), rtol=1e-6)
    mean = (jax.nn.sigmoid(raw["logits"]) + jax.nn.sigmoid(raw["max_logits"])) / 2
    np.testing.assert_allclose(outs[1]["prob"], mean, rtol=1e-6)


def test_slides_without_genes_do_not_train_and_their_nan_does_not_leak():
    method, params = made(**FUSED)
    batch = setup.batch()
    batch["has_genes"] = np.array([True, False, True, True])

    def loss(params, batch):
        out, _ = method.forward(params, {}, {}, batch, None, False)
        return method.objective(out, batch)[0]

    step = jax.jit(jax.value_and_grad(loss))
    value, grads = step(params, batch | {"genes": np.where(batch["has_genes"][:, None], batch["genes"], np.nan)})
    without = batch | {"weight": np.array([1, 0, 1, 1], np.float32)}
    expected, expected_grads = step(params, without)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads, expected_grads)


def test_outputs_are_float_and_slot_major():
    for name in setup.NARROW:
        method = setup.small_method(name)
        shapes = jax.eval_shape(method.init, jax.random.key(0))[0]
        batch = setup.batch()
        out, _ = jax.eval_shape(lambda p, m=method, b=batch: m.forward(p, {}, {}, b, jax.random.key(0), True), shapes)
        assert all(v.shape[0] == 4 and v.dtype == np.float32 for v in out.values()), name


def test_attention_needs_patches():
    method, params = made("snn")
    with pytest.raises(ValueError, match="no attention map"):
        method.attention(params, {}, {}, setup.batch(), "genomics")


def test_absent_mode_fields_and_parameters_are_named():
    method, params = made()
    with pytest.raises(ValueError, match="mode 'both' is not available"):
        method.predict(params, {}, {}, setup.batch(), "both")
    with pytest.raises(ValueError, match="'segment_ids'"):
        method.predict(params, {}, {}, {"patches": 0, "positions": 0, "weight": 0}, "pathology")
    with pytest.raises(ValueError, match="'network' are needed"):
        method.predict({}, {}, {}, setup.batch(), "pathology")


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"model__name": "abmill"}, "model.name = 'abmill' is unknown.*abmil"),
        ({"model__abmil__fusion": "kronecker"}, "model.abmil.fusion = 'kronecker'.*bilinear"),
        ({"model__abmil__dropout": 1.0}, "model.abmil.dropout = 1.0.*drop probability"),
        ({"model__abmil__width": 0}, "model.abmil.width = 0.*integer >= 1"),
        ({"model__abmil__rho": -1}, "model.abmil.rho = -1.*integer >= 0"),
        ({"model__name": "snn", "model__snn__widths": ()}, "model.snn.widths.*positive"),
        ({"loss__survival": "ipcw"}, "loss.survival = 'ipcw'.*cox"),
        ({"loss__alpha": 2.0}, "loss.alpha = 2.0"),
        ({"loss__l1": -1.0}, "loss.l1 = -1.0"),
        ({"model__name": "clam_sb", "loss__survival": "cox"}, "cox.*no time bins"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    config = setup.small_config(**overrides)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_bad_data_are_named():
    config = setup.small_config()
    with pytest.raises(ValueError, match="embeddings of width 7"):
        make_method(config, DataSpec(7, 4))
    with pytest.raises(ValueError, match="at least 2 classes"):
        make_method(config, DataSpec(6, 1))
    with pytest.raises(ValueError, match="reads molecular features"):
        make_method(setup.small_config(**FUSED), DataSpec(6, 4))
    with pytest.raises(ValueError, match="model.abmil.rho = 0"):
        make_method(setup.small_config(model__abmil__rho=0, **FUSED), DataSpec(6, 4, 10))


def test_a_missing_section_is_named():
    config = default_config()
    del config.model["abmil"]
    with pytest.raises(ValueError, match="model.abmil"):
        validate(config)


def test_the_registry_finds_it():
    assert get_method("supervised")(default_config(), DataSpec(1024, 4, task="survival")).name == "supervised"
