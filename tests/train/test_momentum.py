"""Momentum and the rates of CoCoFNet (checks T1, T2 and T5 of its specification)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.train import optim, schedules
from histokd_jax.train.stopping import Stopper


def test_T1_rates_at_stated_epochs():
    found = [
        schedules.learning_rate("cosine_to_max_epochs", 1e-3, epoch=e, max_epochs=30) for e in (0, 1, 10, 15, 20, 29)
    ]
    np.testing.assert_allclose(found, [1e-3, 9.97261e-4, 7.5e-4, 5e-4, 2.5e-4, 2.739e-6], rtol=2e-4)


@pytest.mark.parametrize("decay_bias", [True, False])
def test_T2_two_steps_equal_a_hand_computed_update_of_scale_bias_and_kernel(decay_bias):
    params = {"net": {"scale": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5]), "kernel": jnp.full((2, 2), 3.0)}}
    tx = optim.make_optimizer(
        weight_decay=5e-4, decay_bias=decay_bias, trainable=("net",), groups=("net",), name="sgd", betas=(0.9, 0.999)
    )
    state, rates, gradient = tx.init(params), (1e-3, 5e-4), 0.25
    expected = {name: (np.asarray(value), np.zeros(value.shape)) for name, value in params["net"].items()}
    for lr in rates:
        updates, state = tx.update(jax.tree.map(lambda p: jnp.full_like(p, gradient), params), state, params)
        params = jax.tree.map(lambda p, u, lr=lr: p - lr * u, params, updates)
        for name, (p, trace) in expected.items():
            decay = 5e-4 if decay_bias or name == "kernel" else 0.0
            trace = gradient + decay * p + 0.9 * trace
            expected[name] = p - lr * trace, trace
    for name, (value, _) in expected.items():
        np.testing.assert_allclose(params["net"][name], value, rtol=1e-7)


def test_T5_selection_keeps_the_earlier_epoch_on_ties():
    stopper = Stopper()
    for epoch, score in enumerate((0.4, 0.7, 0.6, 0.7)):
        stopper, improved = stopper.update(score, epoch)
        assert improved == (epoch < 2)
    assert (stopper.best_epoch, stopper.best) == (1, 0.7)
