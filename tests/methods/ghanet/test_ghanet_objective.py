"""The objective of G-HANet (checks C11 and C13 of the specification)."""

import ghanet_setup as setup
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.methods.ghanet.objective import ObjectiveSpec, objective

HAZARDS = np.array([0.1, 0.2, 0.3, 0.4])
LOGITS = np.log(HAZARDS / (1 - HAZARDS))


def one(label, event, spec, logits=LOGITS):
    batch = {"weight": jnp.ones(1), "label": jnp.array([label]), "event": jnp.array([event])}
    return float(objective(spec, {"logits": jnp.asarray(logits, jnp.float32)[None]}, batch)[0])


EXAMPLES = [
    (2, 1, "nll", 0.0, 1.532477),
    (2, 0, "nll", 0.0, 0.685179),
    (2, 1, "ce", 0.0, 0.701179),
    (2, 0, "nll", 0.5, 0.342590),
    (0, 1, "nll", 0.0, 2.302585),
    (3, 0, "nll", 0.0, 1.196005),
]


@pytest.mark.parametrize("label,event,loss,alpha,expected", EXAMPLES)
def test_C11_worked_examples(label, event, loss, alpha, expected):
    spec = ObjectiveSpec(survival=loss, alpha=alpha, rec_weight=0.0)
    np.testing.assert_allclose(one(label, event, spec), expected, atol=1e-6)


@pytest.mark.parametrize("sign", [-20.0, 20.0])
@pytest.mark.parametrize("event", [0, 1])
def test_C11_saturated_logits(sign, event):
    logits = np.full(4, sign)
    assert np.isfinite(one(2, event, ObjectiveSpec(rec_weight=0.0), logits))
    assert np.isfinite(one(2, event, ObjectiveSpec(survival="ce", ce_clamp="both", rec_weight=0.0), logits))


def test_C11_ce_is_infinite_in_faithful_where_survival_is_certain():
    assert np.isinf(one(2, 1, ObjectiveSpec(survival="ce", ce_clamp="low", rec_weight=0.0), np.full(4, -20.0)))


@pytest.mark.parametrize("terms,power", [("sce+mse", 3.0), ("sce", 3.0), ("mse", 3.0), ("sce+mse", 1.0)])
def test_C13_total_is_survival_plus_weighted_sum_of_group_terms(terms, power):
    groups = (7, 11, 5, 13, 9, 4)
    rng = np.random.default_rng(0)
    batch = setup.slot_fields(4, groups=groups)
    out = {
        "logits": rng.normal(size=(4, 4)).astype(np.float32),
        "reconstruction": rng.normal(size=(4, sum(groups))).astype(np.float32),
    }
    rec, start = 0.0, 0
    for g in groups:
        r, z = (a[:, start : start + g].astype(np.float64) for a in (out["reconstruction"], batch["genes"]))
        cosine = np.sum(r * z, 1) / np.linalg.norm(r, axis=1) / np.linalg.norm(z, axis=1)
        rec += ((1 - cosine) ** power).mean() * ("sce" in terms) + ((r - z) ** 2).mean() * ("mse" in terms)
        start += g
    spec = ObjectiveSpec(groups, rec_terms=terms, sce_power=power)
    total, metrics = objective(spec, out, batch)
    nll = objective(ObjectiveSpec(rec_weight=0.0), out, batch)[0]
    np.testing.assert_allclose(float(total), float(nll) + 0.3 * rec, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["rec"][0]), rec, rtol=1e-5)


def test_cox_couples_the_slides_of_a_step():
    batch = setup.slot_fields(4)
    theta = np.array([0.3, -1.0, 0.5, 0.1])
    spec = ObjectiveSpec(survival="cox", rec_weight=0.0)
    time, event = batch["time_months"], batch["event"]
    terms = [theta[i] - np.log(np.exp(theta[time >= time[i]]).sum()) for i in range(4) if event[i]]
    found = objective(spec, {"logits": jnp.asarray(theta[:, None], jnp.float32)}, batch)[0]
    np.testing.assert_allclose(float(found), -sum(terms) / 4, rtol=1e-5)
