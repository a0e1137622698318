"""A5 and C6 of More From Less: the schedule of steps, clipping per array, Adam as Keras has it, NaN guards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from histokd_jax.train import gradients, optim, schedules, state, step
from histokd_jax.types import Method, Stage

CASES = {
    (39000, 3900): {
        0: 0.0, 1: 2.5641025641e-8, 1950: 5e-5, 3899: 9.9974358974e-5, 3900: 1e-4, 21450: 5e-5, 39000: 0.0, 39001: 0.0
    },
    (78100, 78): {0: 0.0, 1: 1.2820512821e-6, 39: 5e-5, 77: 9.8717948718e-5, 78: 1e-4, 39089: 5e-5, 78100: 0, 78101: 0},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_F1_schedule_at_stated_steps(case):
    total, warmup = case
    for at, expected in CASES[case].items():
        found = schedules.warmup_cosine(at, peak=1e-4, total=total, warmup=warmup)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-15), at


def section(**changes):
    train = ConfigDict(common.base().train)
    train.update({"lr": 1e-4, "lr_schedule": "warmup_cosine", "max_epochs": 100})
    for key, value in changes.items():
        train[key] = value
    return train


def test_the_warm_up_of_both_papers_follows_from_their_fractions():
    for steps, fraction, warmup in ((781, 0.001, 78), (390, 0.1, 3900)):
        train = section(warmup_fraction=fraction)
        rates = np.concatenate([schedules.step_rates(train, epoch, steps) for epoch in range(warmup // steps + 1)])
        assert rates[warmup] == pytest.approx(1e-4, rel=1e-12)
        assert rates[warmup - 1] == pytest.approx(1e-4 * (warmup - 1) / warmup)
        assert rates[0] == 0.0
        assert schedules.step_rates(section(warmup_fraction=fraction, lr_first_step=1), 0, steps)[0] > 0.0


def test_other_schedules_change_with_the_epoch():
    train = section(lr_schedule="cosine_to_max_epochs")
    first, second = (schedules.step_rates(train, epoch, 10) for epoch in (0, 1))
    assert len(set(first)) == len(set(second)) == 1 and first[0] > second[0]


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="at most all steps"):
        schedules.warmup_cosine(0, peak=1.0, total=5, warmup=6)
    with pytest.raises(ValueError, match="changes at every step"):
        schedules.learning_rate("warmup_cosine", 1.0, epoch=0, max_epochs=2)
    with pytest.raises(ValueError, match="lr_floor"):
        optim.check(section(lr_floor=1e-5))
    with pytest.raises(ValueError, match="train.clip_per_tensor=-1"):
        optim.check(section(clip_per_tensor=-1.0))


def test_C6_every_array_is_clipped_on_its_own():
    grads = {"a": jnp.full((4,), 3.0), "b": jnp.full((2, 2), 0.1), "c": jnp.zeros(3)}
    found = gradients.clipped(grads, 1.0)
    np.testing.assert_allclose(found["a"], np.full(4, 0.5), rtol=1e-6)
    np.testing.assert_array_equal(found["b"], grads["b"])
    np.testing.assert_array_equal(found["c"], 0.0)


def test_C6_adam_as_keras_has_it():
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(3, 2)), rng.normal(size=(4, 3, 2)) * 1e-6
    tx = optim.make_optimizer(
        weight_decay=0.0, decay_bias=True, trainable=("a",), groups=("a",), name=optim.KERAS_ADAM, eps=1e-7
    )
    params = {"a": jnp.asarray(start, jnp.float32)}
    opt, p, m, v = tx.init(params), start.copy(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        updates, opt = tx.update({"a": jnp.asarray(g, jnp.float32)}, opt, params)
        params = {"a": params["a"] - 1e-2 * updates["a"]}
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - 1e-2 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)
    np.testing.assert_allclose(params["a"], p, rtol=1e-4, atol=1e-6)
    usual = optim.make_optimizer(weight_decay=0.0, decay_bias=True, trainable=("a",), groups=("a",), eps=1e-7)
    first, _ = usual.update({"a": jnp.asarray(grads[0], jnp.float32)}, usual.init(params), params)
    assert np.abs(first["a"]).mean() > 0.7, "the usual form does not damp tiny gradients at its first step"


def test_A5_nan_entries_of_gradients_are_filled():
    grads = {"a": jnp.array([1.0, jnp.nan, 2.0])}
    np.testing.assert_allclose(gradients.filled(grads, 1e-5)["a"], [1.0, 1e-5, 2.0])


def division():
    """A method whose gradient is infinite where the batch holds 0."""

    def objective(outputs, batch, number, stage):
        return outputs["y"].sum(), {"term": (outputs["y"].sum(), jnp.ones(()))}

    return Method(
        name="division", init=lambda key: ({"w": jnp.ones(2)}, {"count": jnp.zeros(())}),
        forward=lambda p, f, e, b, k, train, stage: ({"y": p["w"] / b["x"]}, {"count": e["count"] + 1.0}),
        objective=objective, predict=None, modes=(), stages=(Stage("s", ("w",), ()),), requires=("x",),
        batch_coupled=True,
    )  # fmt: skip


@pytest.mark.parametrize("choice", [gradients.SKIP, gradients.FILL, gradients.RAISE])
def test_deviation_6_steps_that_are_not_finite(choice):
    method = division()
    params, extra = method.init(None)
    good, bad = ({"x": jnp.array([1.0, x])} for x in (2.0, 0.0))
    train = section(nonfinite=choice, wd=0.0)
    tx = optim.from_config(train, method.stages[0], ("w",))
    names = step.metric_names(method, "s", params, extra, good)
    names += [step.NONFINITE_STEPS] if choice != gradients.RAISE else []
    current = state.start_stage(params, extra, jax.random.key(0), tx, names)
    move = jax.jit(step.make_train_step(method, tx, "s", nonfinite=choice))
    current, _ = move(current, good, jnp.float32(0.1))
    before = current
    current, _ = move(current, bad, jnp.float32(0.1))
    assert int(current.step) == 2
    if choice == gradients.RAISE:
        assert not np.isfinite(current.totals["loss"][0])
        return
    total, count = current.totals[step.NONFINITE_STEPS]
    assert (total, count) == (1.0, 2.0) and current.totals["term"] == before.totals["term"]
    kept = bool(np.array_equal(current.params["w"], before.params["w"]))
    assert kept == (choice == gradients.SKIP)
    assert float(current.extra["count"]) == (1.0 if choice == gradients.SKIP else 2.0)
    if choice == gradients.SKIP:
        for a, b in zip(jax.tree.leaves(current.opt_state), jax.tree.leaves(before.opt_state)):
            np.testing.assert_array_equal(a, b)
