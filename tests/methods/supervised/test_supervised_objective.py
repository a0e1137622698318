"""The objective of the supervised baselines against NumPy in double precision; check B11 of the specification."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import supervised_setup as setup

from histokd_jax.losses import survival
from histokd_jax.methods.supervised.objective import (
    ObjectiveSpec,
    bag_loss,
    instance_loss,
    loss_terms,
    objective,
)
from histokd_jax.types import CLASSIFICATION

S, C, B = 5, 4, 3


def outputs(seed=0):
    rng = np.random.default_rng(seed)
    # Bags of 7, 4, 1, 6 and 2 patches: 3, 2, 0, 3 and 1 instances per end.
    held = np.arange(B)[None] < np.array([3, 2, 0, 3, 1])[:, None]
    arrays = {
        "logits": rng.normal(size=(S, C)),
        "max_logits": rng.normal(size=(S, C)),
        "embedding": rng.normal(size=(S, 6)),
        "instance_logits": rng.normal(size=(S, C, 2 * B, 2)),
        "instance_valid": np.concatenate([held, held], axis=1),
        "l1": np.full(S, 3.5),
    }
    return {k: v.astype(np.float32) for k, v in arrays.items()}


def batch():
    return {
        "weight": np.array([1, 1, 1, 1, 0], np.float32),
        "label": np.array([2, 0, 3, 1, 0], np.int32),
        "event": np.array([1, 0, 1, 1, 0], np.float32),
        "time_months": np.array([5.0, 9.0, 2.0, 7.0, 0.0], np.float32),
    }


def numpy_instance_loss(out, label, s, form, subtyping):
    """One slide, straight from section 7."""
    held = int(out["instance_valid"][s, :B].sum())
    if not held:
        return 0.0
    logits = out["instance_logits"][s].astype(np.float64)

    def cost(z, y):
        margin = np.array([y != 0, y != 1]) if form == "smooth_svm" else 0.0
        return np.log(np.sum(np.exp(z + margin))) - z[y]

    own = [cost(logits[label, i], 1) for i in range(held)] + [cost(logits[label, B + i], 0) for i in range(held)]
    total = np.mean(own)
    if not subtyping:
        return total
    for c in set(range(C)) - {label}:
        total += np.mean([cost(logits[c, i], 0) for i in range(held)])
    return total / C


@pytest.mark.parametrize("subtyping", [True, False])
@pytest.mark.parametrize("form", ["ce", "smooth_svm"])
def test_instance_loss_equals_the_specification_slide_by_slide(form, subtyping):
    spec, out, label = ObjectiveSpec(instance_loss=form, subtyping=subtyping), outputs(), batch()["label"]
    want = [numpy_instance_loss(out, label[s], s, form, subtyping) for s in range(S)]
    np.testing.assert_allclose(instance_loss(spec, out, label), want, rtol=1e-5)


def test_censored_patients_train_no_instance_head_by_default():
    out, fields = outputs(), batch()
    each = np.array([numpy_instance_loss(out, fields["label"][s], s, "ce", True) for s in range(4)])
    for on, kept in (("uncensored", [1, 0, 1, 1]), ("all", [1, 1, 1, 1])):
        terms = loss_terms(ObjectiveSpec(instance_on=on), out, fields)
        np.testing.assert_allclose(terms["instance"], np.mean(each * kept), rtol=1e-5)


def test_total_is_the_weighted_sum_of_the_terms_and_empty_slots_do_not_count():
    spec, out, fields = ObjectiveSpec(l1=0.01, l1_scaling="per_bag"), outputs(), batch()
    terms = loss_terms(spec, out, fields)
    total, metrics = objective(spec, out, fields)
    want = 0.2 * terms["bag"] + 0.3 * terms["instance"] + 0.5 * terms["max"] + 0.01 * terms["l1"]
    np.testing.assert_allclose(total, want, rtol=1e-6)
    assert set(metrics) == {"loss", "bag", "instance", "max", "l1", "norm"}
    garbage = {k: np.concatenate([v[:4], np.full_like(v[4:], np.nan)]) for k, v in out.items()}
    value, grads = jax.value_and_grad(lambda o: objective(spec, o, fields)[0])(garbage)
    np.testing.assert_allclose(value, total, rtol=1e-6)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    plain = {k: out[k] for k in ("logits", "embedding", "l1")}
    np.testing.assert_allclose(objective(ObjectiveSpec(), plain, fields)[0], terms["bag"], rtol=1e-6)


@pytest.mark.parametrize("scaling,factor", [("per_bag", 4.0), ("per_update", 1.0)])
def test_l1_is_added_once_per_slide_or_once_per_update(scaling, factor):
    terms = loss_terms(ObjectiveSpec(l1=1e-3, l1_scaling=scaling), outputs(), batch())
    np.testing.assert_allclose(terms["l1"], factor * 3.5, rtol=1e-6)


def test_l1_covers_every_parameter_and_its_gradient_is_their_sign():
    method = setup.small_method("snn", loss__l1=0.1, loss__l1_scaling="per_update")
    params = method.init(jax.random.key(0))[0]
    fields = setup.batch()

    def penalty(params):
        out, _ = method.forward(params, {}, {}, fields, None, False)
        return method.objective(out, fields)[1]["l1"][0]

    value, grads = jax.value_and_grad(penalty)(params)
    np.testing.assert_allclose(value, sum(np.abs(p).sum() for p in jax.tree.leaves(params)), rtol=1e-5)
    jax.tree.map(lambda g, p: np.testing.assert_allclose(g, np.sign(p), atol=1e-6), grads, params)


def test_survival_forms_use_the_shared_losses():
    out, fields = outputs(), batch()
    where = fields["weight"] > 0
    args = (out["logits"], fields["label"], fields["event"])
    cases = {
        "nll": np.mean(survival.nll_survival(*args, alpha=0.3)[:4]),
        "ce": np.mean(survival.ce_survival(*args, alpha=0.3, clamp="both")[:4]),
        "cox": survival.cox_loss(out["logits"][:4, 0], fields["time_months"][:4], fields["event"][:4]),
    }
    for name, want in cases.items():
        got = bag_loss(ObjectiveSpec(survival=name, alpha=0.3), out["logits"], fields, where)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_binary_cross_entropy_averages_over_the_classes():
    out, fields = outputs(), batch()
    z = out["logits"][:4].astype(np.float64)
    y = np.eye(C)[fields["label"][:4]]
    p = 1 / (1 + np.exp(-z))
    want = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    spec = ObjectiveSpec(task=CLASSIFICATION, classification="bce")
    np.testing.assert_allclose(bag_loss(spec, out["logits"], fields, fields["weight"] > 0), want, rtol=1e-6)


def test_traced_values_replace_numbers():
    spec, out, fields = ObjectiveSpec(l1=0.0), outputs(), batch()
    other = dataclasses.replace(spec, l1=0.02, alpha=0.4, instance_weight=0.1)
    values = {"loss.l1": jnp.float32(0.02), "loss.alpha": jnp.float32(0.4), "loss.instance_weight": jnp.float32(0.1)}
    got = jax.jit(lambda values: objective(spec.with_values(values), out, fields)[0])(values)
    np.testing.assert_allclose(got, objective(other, out, fields)[0], rtol=1e-6)
    with pytest.raises(ValueError, match="loss.ties"):
        spec.with_values({"loss.ties": jnp.float32(0)})


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
def test_B11_instance_gradients_touch_the_selected_patches_and_the_head_of_the_true_class(name):
    """With `subtyping` off; slides of 40, 9, 1 and 20 patches, B = 8: 16, 8, 0 and 16 patches are selected."""
    method = setup.small_method(name, "classification", loss__subtyping=False)
    sizes = (40, 9, 1, 20)
    fields = setup.batch(sizes, fill=0.0)
    fields["label"][:] = 2
    params = jax.jit(method.init)(jax.random.key(0))[0]

    def loss(params, patches):
        out, _ = method.forward(params, {}, {}, fields | {"patches": patches}, None, False)
        return method.objective(out, fields)[1]["instance"][0]

    # A network without dead ReLU: every selected patch then has a gradient.
    params["network"]["bag"]["proj"]["bias"] = jnp.full((8,), 10.0)
    d_params, d_patches = jax.jit(jax.grad(loss, (0, 1)))(params, fields["patches"])
    touched = np.abs(d_patches).sum(axis=-1) > 0
    for s, selected in enumerate((16, 8, 0, 16)):
        assert touched[fields["segment_ids"] == s + 1].sum() == selected
    heads = [np.abs(d_params["network"][f"instance_{c}"]["kernel"]).max() for c in range(4)]
    assert heads[2] > 1e-4 and heads[0] == heads[1] == heads[3] == 0
    attention = jax.tree.leaves(d_params["network"]["bag"]["attention"])
    assert all(np.all(g == 0) for g in attention), "the selection has no gradient"
