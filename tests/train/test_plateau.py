"""Rates that fall on a plateau, ties, clipped gradients, groups without decay: what MoMKD asks of the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from histokd_jax.train import optim
from histokd_jax.train.loop import Progress
from histokd_jax.train.stopping import Plateau, Stopper


def settings(**train):
    base = dict(lr=1e-3, lr_schedule="plateau", lr_floor=0.0, max_epochs=50, plateau_factor=0.2, plateau_patience=2)
    return ConfigDict({"train": {**base, **train}, "early_stop": {}})


def test_the_rate_falls_after_more_than_patience_epochs_without_gain():
    cfg, progress, rates = settings(), Progress(), []
    for epoch, value in enumerate([0.5, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.7, 0.7]):
        rates.append(progress.rates(cfg, 2)[0])
        progress, _ = progress.monitored(cfg, value, epoch)
    np.testing.assert_allclose(rates, [1e-3] * 5 + [2e-4] * 3 + [4e-5] * 2, rtol=1e-9)


@pytest.mark.torch
def test_plateau_equals_the_library_of_the_published_code():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).choice([0.5, 0.50001, 0.6, 0.7, 0.70005, 0.71], 60)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.2, patience=5)
    plateau = Plateau()
    for value in values:
        scheduler.step(float(value))
        plateau = plateau.update(float(value), 5)
        assert plateau.scale(0.2) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1.1e-8)


def test_other_schedules_do_not_see_the_plateau():
    cfg, progress = settings(lr_schedule="constant"), Progress()
    for epoch in range(9):
        progress, _ = progress.monitored(cfg, 0.5, epoch)
    assert progress.rates(cfg, 2)[0] == 1e-3 and progress.plateau == Plateau()


def test_progress_survives_json_also_without_a_plateau():
    progress, _ = Progress().monitored(settings(), 0.5, 0)
    assert Progress.from_json(progress.to_json()) == progress
    old = {name: value for name, value in progress.to_json().items() if name != "plateau"}
    assert Progress.from_json(old).stopper == progress.stopper


def test_ties_improve_if_asked_to():
    for ties in (False, True):
        stopper, _ = Stopper().update(0.9, 0)
        stopper, improved = stopper.update(0.9, 1, ties)
        assert improved == ties and stopper.best_epoch == int(ties) and stopper.bad_epochs == int(not ties)


def test_gradients_are_clipped_by_their_global_norm_before_the_moments():
    params = {"a": {"w": jnp.ones((3, 2))}, "b": {"w": jnp.ones(4)}}
    grads = jax.tree.map(lambda p: 7.0 * p, params)
    options = dict(weight_decay=0.0, decay_bias=True, trainable=("a", "b"), groups=("a", "b"), name="sgd")
    norm = 7.0 * np.sqrt(10)
    for limit, factor in ((0.0, 1.0), (100.0, 1.0), (2.0, 2.0 / norm)):
        tx = optim.make_optimizer(**options, clip_norm=limit)
        updates, _ = tx.update(grads, tx.init(params), params)
        jax.tree.map(lambda u, g, f=factor: np.testing.assert_allclose(u, f * g, rtol=1e-6), updates, grads)
    with pytest.raises(ValueError, match="train.clip_norm=-1"):
        optim.make_optimizer(**options, clip_norm=-1)


@pytest.mark.parametrize("decay_bias", [True, False])
@pytest.mark.parametrize("trainable", [("a", "b"), ("a", "b", "c")])
def test_undecayed_groups_do_not_move_without_a_gradient(decay_bias, trainable):
    params = {name: {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)} for name in ("a", "b", "c")}
    zero = jax.tree.map(jnp.zeros_like, params)
    options = dict(weight_decay=0.1, decay_bias=decay_bias, trainable=trainable, groups=("a", "b", "c"))
    tx = optim.make_optimizer(**options, undecayed=("b",))
    updates, _ = tx.update(zero, tx.init(params), params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["b"]))
    np.testing.assert_allclose(updates["a"]["w"], 0.1)
    np.testing.assert_allclose(updates["a"]["bias"], 0.1 if decay_bias else 0.0)
    assert np.any(updates["c"]["w"]) == ("c" in trainable)
