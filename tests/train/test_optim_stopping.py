"""Check J of the MKD and C15 of the G-HANet specification: schedules, optimizers and early stopping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from histokd_jax.train import optim, schedules
from histokd_jax.train.stopping import Stopper


@pytest.mark.parametrize("name", ["cosine50_periodic", "cosine50_floor0"])
def test_check_J_learning_rate_at_stated_epochs(name):
    got = [schedules.learning_rate(name, 2e-4, epoch=e, max_epochs=100) for e in (0, 1, 10, 25, 49, 50)]
    np.testing.assert_allclose(got, [2e-4, 1.998027e-4, 1.809017e-4, 1e-4, 1.973e-7, 0], rtol=5e-4, atol=1e-12)


NAMES = ("cosine50_periodic", "cosine50_floor0", "cosine_to_max_epochs")


def test_check_J_learning_rate_at_epoch_75():
    rate = {n: schedules.learning_rate(n, 2e-4, epoch=75, max_epochs=100) for n in NAMES}
    assert rate["cosine50_periodic"] == pytest.approx(1e-4)
    assert rate["cosine50_floor0"] == pytest.approx(0, abs=1e-12)
    assert rate["cosine_to_max_epochs"] == pytest.approx(1e-4 * (1 + np.cos(0.75 * np.pi)))


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="cosine50_floor0"):
        schedules.learning_rate("step", 1e-3, epoch=0, max_epochs=1)


def test_check_J_stops_after_epoch_index_6_if_only_epoch_0_improves():
    stopper = Stopper()
    for epoch in range(100):
        stopper, improved = stopper.update(0.9 if epoch == 0 else 0.9, epoch)  # ties are no improvement
        assert improved == (epoch == 0)
        if stopper.should_stop(epoch, patience=5, min_epoch=5):
            break
    assert epoch == 6 and stopper.best_epoch == 0


def test_optimizer_equals_library_adamw_and_frozen_groups_do_not_move():
    params = {"a": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, "f": {"w": jnp.full((2, 2), 3.0)}}
    grads = jax.tree.map(lambda p: p * 0.3, params)
    tx = optim.make_optimizer(weight_decay=0.1, decay_bias=True, trainable=("a",), groups=("a", "f"))
    updates, _ = tx.update(grads, tx.init(params), params)
    reference = optax.adamw(1e-2, weight_decay=0.1)
    want, _ = reference.update(grads["a"], reference.init(params["a"]), params["a"])
    jax.tree.map(lambda u, w: np.testing.assert_allclose(-1e-2 * u, w, rtol=1e-5), updates["a"], want)
    assert np.all(np.asarray(updates["f"]["w"]) == 0)


def test_decay_bias_false_spares_vectors():
    params = {"a": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = optim.make_optimizer(weight_decay=0.1, decay_bias=False, trainable=("a",), groups=("a",))
    updates, _ = tx.update(zero, tx.init(params), params)
    assert np.all(np.asarray(updates["a"]["b"]) == 0) and np.allclose(updates["a"]["w"], 0.1)


def numpy_adam(p, grads, *, rate, wd, betas, coupled):
    """Adam by its definition in float64; weight decay in the gradient (coupled) or beside it."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for step, g in enumerate(grads, start=1):
        g = g + wd * p if coupled else g
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        update = m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + 1e-8)
        p = p - rate * (update if coupled else update + wd * p)
    return p


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
@pytest.mark.parametrize("name", (optim.ADAMW, optim.ADAM_L2))
def test_C15_adam_steps_equal_the_definition(name, betas):
    rng, wd, rate = np.random.default_rng(3), 0.1, 2e-2
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3)) * 0.05
    params = {"a": {"w": jnp.asarray(start, jnp.float32)}}
    tx = optim.make_optimizer(weight_decay=wd, decay_bias=True, trainable=("a",), groups=("a",), name=name, betas=betas)
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update({"a": {"w": jnp.asarray(grad, jnp.float32)}}, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    results = {c: numpy_adam(start, grads, rate=rate, wd=wd, betas=betas, coupled=c) for c in (True, False)}
    np.testing.assert_allclose(params["a"]["w"], results[name == optim.ADAM_L2], rtol=2e-5, atol=2e-6)
    assert np.abs(results[True] - results[False]).max() > 1e-3, "the two decays must differ for this check"


def test_constant_rate_and_cosine_to_a_floor():
    assert {schedules.learning_rate("constant", 3e-4, epoch=e, max_epochs=20) for e in range(20)} == {3e-4}
    options = {"max_epochs": 50, "floor": 5e-6}
    got = [schedules.learning_rate("cosine_to_floor", 1e-4, epoch=e, **options) for e in (0, 25, 50, 60)]
    np.testing.assert_allclose(got, [1e-4, 5.25e-5, 5e-6, 5e-6], rtol=1e-12)


@pytest.mark.parametrize(
    "key,value,message",
    [
        ("optimizer", "lion", "train.optimizer='lion'.*adam_l2"),
        ("lr_schedule", "step", "train.lr_schedule='step'.*cosine_to_floor"),
        ("betas", (0.9,), "train.betas"),
        ("betas", (0.9, 1.0), "train.betas"),
        ("lr_floor", 1e-6, "cosine_to_floor only"),
        ("lr_floor", 1.0, "train.lr_floor"),
    ],
)
def test_settings_of_the_trainer_are_checked_before_training(key, value, message):
    train = common.base().train
    optim.check(train)
    train[key] = value
    with pytest.raises(ValueError, match=message):
        optim.check(train)
