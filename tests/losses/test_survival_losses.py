"""Survival losses: worked examples and golden values of G-HANet, plain float64 loops, lifelines, gradients, masks."""

import json

import jax
import jax.test_util
import numpy as np
import pandas as pd
import pytest

from histokd_jax import losses

H = np.array([0.1, 0.2, 0.3, 0.4])
X = np.log(H / (1 - H))[None]


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def numpy_nll(logits, bins, event, alpha=0.0):
    """The three formulas of section 5, written out per patient."""
    result = []
    for x, y, e in zip(np.asarray(logits, np.float64), bins, event, strict=True):
        h = sigmoid(x)
        s = np.concatenate([[1.0], np.cumprod(1 - h)])
        uncensored = -e * (np.log(max(s[y], 1e-7)) + np.log(max(h[y], 1e-7)))
        censored = -(1 - e) * np.log(max(s[y + 1], 1e-7))
        result.append((1 - alpha) * (censored + uncensored) + alpha * uncensored)
    return np.array(result)


def numpy_ce(logits, bins, event, alpha=0.0):
    result = []
    for x, y, e in zip(np.asarray(logits, np.float64), bins, event, strict=True):
        h = sigmoid(x)
        s = np.concatenate([[1.0], np.cumprod(1 - h)])
        ce = -np.log(1 - max(s[y + 1], 1e-7)) if e else -np.log(max(s[y + 1], 1e-7))
        reg = -e * (np.log(s[y] + 1e-7) + np.log(max(h[y], 1e-7)))
        result.append((1 - alpha) * ce + alpha * reg)
    return np.array(result)


def numpy_cox(theta, time, event, ties="breslow"):
    """Sum over distinct death times; Efron's correction as printed in textbooks."""
    total = 0.0
    for t in np.unique(time[event == 1]):
        tied = (time == t) & (event == 1)
        risk, own, d = np.exp(theta[time >= t]).sum(), np.exp(theta[tied]).sum(), tied.sum()
        total += theta[tied].sum()
        for l in range(d):
            total -= np.log(risk - (l / d * own if ties == "efron" else 0.0))
    return -total / len(theta)


def cohort(b=12, k=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(b, k)) * 2, rng.integers(0, k, b), rng.integers(0, 2, b)


def times(b=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=b), rng.integers(1, 6, b).astype(float), rng.integers(0, 2, b)


WORKED = [
    (losses.nll_survival, 2, 1, 0.0, 1.532477),
    (losses.nll_survival, 2, 0, 0.0, 0.685179),
    (losses.ce_survival, 2, 1, 0.0, 0.701179),
    (losses.nll_survival, 2, 0, 0.5, 0.342590),
    (losses.nll_survival, 0, 1, 0.0, 2.302585),
    (losses.nll_survival, 3, 0, 0.0, 1.196005),
]


def test_C11_worked_survival_curve_and_risk():
    with jax.enable_x64(True):
        np.testing.assert_allclose(losses.survival_curve(X), [[0.9, 0.72, 0.504, 0.3024]], rtol=1e-12)
        np.testing.assert_allclose(losses.risk_score(X), [-2.4264], rtol=1e-12)


@pytest.mark.parametrize("loss,bin_index,event,alpha,expected", WORKED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_C11_worked_losses(loss, bin_index, event, alpha, expected, dtype):
    with jax.enable_x64(True):
        value = loss(X.astype(dtype), np.array([bin_index]), np.array([event]), alpha=alpha)
    assert value.dtype == dtype
    np.testing.assert_allclose(value, [expected], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["default", "n57"])
def test_golden_hazards_survival_risk_and_nll(golden_dir, case):
    out = json.loads((golden_dir / "g_hanet.json").read_text())["cases"][case]["outputs"]
    golden = {name: np.array(record["float64"]) for name, record in out.items() if "float64" in record}
    logits = golden["logits"].reshape(1, 4)
    with jax.enable_x64(True):
        np.testing.assert_allclose(losses.survival_curve(logits)[0], golden["survival"].reshape(-1), rtol=1e-12)
        np.testing.assert_allclose(losses.risk_score(logits), golden["risk"].reshape(-1), rtol=1e-12)
        died = losses.nll_survival(logits, np.array([2]), np.array([1]))
        censored = losses.nll_survival(logits, np.array([1]), np.array([0]))
    np.testing.assert_allclose(died[0], golden["nll_bin2_death"].item(), rtol=1e-12)
    np.testing.assert_allclose(censored[0], golden["nll_bin1_censored"].item(), rtol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "loss,reference", [(losses.nll_survival, numpy_nll), (losses.ce_survival, numpy_ce)], ids=["nll", "ce"]
)
def test_losses_match_the_formulas(loss, reference, alpha):
    logits, bins, event = cohort()
    with jax.enable_x64(True):
        value = jax.jit(lambda x: loss(x, bins, event.astype(bool), alpha=alpha))(logits)
    np.testing.assert_allclose(value, reference(logits, bins, event, alpha), rtol=1e-10)


@pytest.mark.parametrize("loss", [losses.nll_survival, losses.ce_survival], ids=["nll", "ce"])
def test_gradients_match_finite_differences(loss):
    logits, bins, event = cohort(b=5)
    with jax.enable_x64(True):
        jax.test_util.check_grads(
            lambda x: loss(x, bins, event, alpha=0.3).sum(), (logits,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("event", [0, 1])
def test_C11_saturated_logits_give_finite_nll_and_gradient(sign, event):
    logits, bins = np.full((4, 4), 20.0 * sign, np.float32), np.arange(4)
    value, gradient = jax.value_and_grad(lambda x: losses.nll_survival(x, bins, np.full(4, event)).sum())(logits)
    np.testing.assert_allclose(value, numpy_nll(logits, bins, np.full(4, event)).sum(), rtol=1e-4, atol=1e-5)
    assert np.isfinite(gradient).all()


def test_clamped_factors_pass_no_gradient():
    logits = np.array([[20.0, 20.0, 0.0]], np.float32)  # S_1 = 4e-18, far below the clamp
    gradient = jax.grad(lambda x: losses.nll_survival(x, np.array([1]), np.array([0])).sum())(logits)
    np.testing.assert_array_equal(gradient, 0.0)


def test_C11_ce_is_infinite_with_the_low_clamp_and_finite_with_both():
    logits, died = np.full((1, 4), -20.0, np.float32), (np.array([0]), np.array([1]))
    assert np.isposinf(losses.ce_survival(logits, *died)[0])
    both, gradient = jax.value_and_grad(lambda x: losses.ce_survival(x, *died, clamp="both").sum())(logits)
    np.testing.assert_allclose(both, -np.log(1e-7), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_D16_a_censored_patient_with_certain_survival_has_a_finite_gradient():
    logits = np.full((1, 4), -20.0, np.float32)
    value, gradient = jax.value_and_grad(lambda x: losses.ce_survival(x, np.array([0]), np.array([0])).sum())(logits)
    assert abs(value) < 1e-6 and np.isfinite(gradient).all()


def test_clamps_agree_away_from_the_ends():
    logits, bins, event = cohort()
    with jax.enable_x64(True):
        low, both = (losses.ce_survival(logits, bins, event, alpha=0.2, clamp=c) for c in ("low", "both"))
    np.testing.assert_allclose(low, both, rtol=1e-10)
    with pytest.raises(ValueError, match="clamp='none'"):
        losses.ce_survival(logits, bins, event, clamp="none")


def poisoned(x, where):
    return np.where(where.reshape(-1, *([1] * (x.ndim - 1))), x, np.nan)


@pytest.mark.parametrize("loss", [losses.nll_survival, losses.ce_survival], ids=["nll", "ce"])
def test_masked_rows_are_zero_in_value_and_gradient(loss):
    logits, bins, event = cohort()
    where = np.arange(12) % 3 > 0
    dirty = poisoned(logits, where)
    bad_bins, bad_event = np.where(where, bins, 99), np.where(where, event, np.nan)
    with jax.enable_x64(True):
        value = loss(dirty, bad_bins, bad_event, where=where)
        gradient = jax.grad(lambda x: loss(x, bad_bins, bad_event, where=where).sum())(dirty)
        expected = loss(logits[where], bins[where], event[where])
    np.testing.assert_allclose(value[where], expected, rtol=1e-12)
    np.testing.assert_array_equal(value[~where], 0.0)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[~where], 0.0)


def test_bfloat16_accumulates_in_float32():
    logits, bins, event = cohort()
    value = losses.nll_survival(jax.numpy.asarray(logits, jax.numpy.bfloat16), bins, event)
    assert value.dtype == np.float32


@pytest.mark.parametrize("ties", ["breslow", "efron"])
@pytest.mark.parametrize("seed", range(4))
def test_cox_matches_the_textbook_sum(ties, seed):
    theta, time, event = times(seed=seed)
    with jax.enable_x64(True):
        value = losses.cox_loss(theta, time, event, ties=ties)
    np.testing.assert_allclose(value, numpy_cox(theta, time, event, ties), rtol=1e-12)


def test_cox_with_efron_matches_the_likelihood_of_lifelines():
    from lifelines import CoxPHFitter

    x, time, event = times(b=60, seed=3)
    table = pd.DataFrame({"x": x, "time": time, "event": event})
    fitted = CoxPHFitter().fit(table, "time", "event")
    theta = fitted.params_["x"] * (x - x.mean())
    with jax.enable_x64(True):
        value = losses.cox_loss(theta, time, event, ties="efron")
    np.testing.assert_allclose(-60 * float(value), fitted.log_likelihood_, rtol=1e-8)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
def test_cox_gradient_mask_and_shift(ties):
    theta, time, event = times()
    where = np.arange(12) % 4 > 0
    dirty = (poisoned(theta, where), poisoned(time, where), poisoned(event.astype(float), where))
    with jax.enable_x64(True):

        def masked(x):
            return losses.cox_loss(x, *dirty[1:], ties=ties, where=where)

        jax.test_util.check_grads(
            lambda x: losses.cox_loss(x, time, event, ties=ties), (theta,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6
        )
        value, gradient = jax.value_and_grad(masked)(dirty[0])
        clean = lambda x: losses.cox_loss(x, time[where], event[where], ties=ties)  # noqa: E731
        expected, inner = jax.value_and_grad(clean)(theta[where])
        shifted = losses.cox_loss(theta + 500.0, time, event, ties=ties)
        np.testing.assert_allclose(shifted, losses.cox_loss(theta, time, event, ties=ties), rtol=1e-9)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient[where], inner, rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(gradient[~where], 0.0)


@pytest.mark.parametrize("ties", ["breslow", "efron"])
@pytest.mark.parametrize(
    "theta,time,event,where",
    [
        ([1.3], [5.0], [1], None),  # a single patient in the batch
        ([1.3, 0.2, np.nan], [5.0, 2.0, np.nan], [1, 1, 1], [True, False, False]),  # a single valid one
        ([1.3, -0.4, 2.0], [5.0, 2.0, 3.0], [0, 0, 0], None),  # nobody died
        ([1.3, -0.4], [5.0, 2.0], [1, 1], [False, False]),  # nobody at all
    ],
    ids=["single", "single_valid", "no_event", "none_valid"],
)
def test_cox_without_information_is_zero_with_zero_gradient(theta, time, event, where, ties):
    theta, time, event = (np.array(x, np.float32) for x in (theta, time, event))
    where = None if where is None else np.array(where)
    value, gradient = jax.value_and_grad(lambda x: losses.cox_loss(x, time, event, ties=ties, where=where))(theta)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, 0.0)


def test_cox_is_stable_for_extreme_risks():
    theta = np.array([-1e4, 0.0, 1e4, 3e4], np.float32)
    time, event = np.array([1.0, 2.0, 3.0, 4.0]), np.ones(4)
    value, gradient = jax.value_and_grad(lambda x: losses.cox_loss(x, time, event, ties="efron"))(theta)
    np.testing.assert_allclose(value, (4e4 + 3e4 + 2e4) / 4, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_cox_refuses_unknown_ties_and_matrices():
    theta, time, event = times()
    with pytest.raises(ValueError, match="ties='exact'"):
        losses.cox_loss(theta, time, event, ties="exact")
    with pytest.raises(ValueError, match=r"shape \(12, 1\)"):
        losses.cox_loss(theta[:, None], time, event)


def test_ties_everywhere_leave_breslow_at_the_mean_of_log_softmax():
    theta = np.array([0.3, -1.0, 2.0])
    with jax.enable_x64(True):
        value = losses.cox_loss(theta, np.ones(3), np.ones(3))
    np.testing.assert_allclose(value, -np.mean(theta - np.log(np.exp(theta).sum())), rtol=1e-12)
