"""RAdam and Lookahead: against their definitions in float64 and PyTorch, and as trainers use them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from histokd_jax.train import optim, rectified, schedules, step

RATE, DECAY = 1e-2, 0.1
BETAS = [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)]


def numpy_radam(start, grads, *, betas, rate=RATE, wd=DECAY, eps=1e-8):
    """[steps, ...] parameters after every step: RAdam by its definition, decay beside the gradient."""
    p, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    longest, found = 2 / (1 - betas[1]) - 1, []
    for t, g in enumerate(grads, start=1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        unbiased, power = m / (1 - betas[0] ** t), betas[1] ** t
        length = longest - 2 * t * power / (1 - power)
        update = unbiased
        if length > 5:
            r = np.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
            update = unbiased * r * np.sqrt(1 - power) / (np.sqrt(v) + eps)
        p = p * (1 - rate * wd) - rate * update
        found.append(p)
    return np.array(found)


def numpy_lookahead(start, grads, *, betas, period=6, slow_step=0.5):
    """[steps, ...] parameters: every `period` steps half-way back to where the slow weights were."""
    fast, slow, found = start, start, []
    # The moves of RAdam do not depend on where it is, but for the decay.
    walked = np.concatenate([[np.zeros_like(start)], numpy_radam(np.zeros_like(start), grads, betas=betas, wd=0.0)])
    for t, move in enumerate(np.diff(walked, axis=0), start=1):
        fast = fast * (1 - RATE * DECAY) + move
        if t % period == 0:
            slow = slow + slow_step * (fast - slow)
            fast = slow
        found.append(fast)
    return np.array(found)


def arrays(steps=40, scale=0.05):
    rng = np.random.default_rng(7)
    grads = rng.normal(size=(steps, 4, 3)) * scale
    # As small as eps, where the place of eps decides.
    grads[:, 0] *= 1e-7
    return rng.normal(size=(4, 3)), grads


def run(name, start, grads, betas, rates=None):
    """[steps, ...] parameters as the training step moves them."""
    tx = optim.make_optimizer(
        weight_decay=DECAY, decay_bias=True, trainable=("a",), groups=("a",), name=name, betas=betas
    )
    params = {"a": {"w": jnp.asarray(start, jnp.float32)}}

    @jax.jit
    def one(params, state, grad, rate):
        updates, state = tx.update({"a": {"w": grad}}, state, params)
        moved = optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates))
        return rectified.settle(tx, moved, state)

    state, found = tx.init(params), []
    for number, grad in enumerate(grads):
        rate = jnp.float32(RATE if rates is None else rates[number])
        params, state = one(params, state, jnp.asarray(grad, jnp.float32), rate)
        found.append(np.asarray(params["a"]["w"]))
    return np.array(found)


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_radam_equals_its_definition(betas):
    start, grads = arrays()
    want = numpy_radam(start, grads, betas=betas)
    np.testing.assert_allclose(run(optim.RADAM, start, grads, betas), want, rtol=4e-6, atol=2e-6)
    other = numpy_radam(start, grads, betas=betas, eps=1e-7)
    assert np.abs(want - other).max() > 1e-5, "eps must matter in this check"


def test_radam_is_not_that_of_the_library():
    """Which adds eps to the bias-corrected root: the reason for one of our own."""
    start, grads = arrays()
    library, ours, first = optax.scale_by_radam(), rectified.scale_by_radam(), jnp.asarray(grads[0], jnp.float32)
    state, own = library.init(first), ours.init(first)
    for value in grads[:10]:
        value = jnp.asarray(value, jnp.float32)
        theirs, state = library.update(value, state)
        mine, own = ours.update(value, own)
    assert np.abs(np.asarray(theirs - mine)[0]).max() > 1e-3 > np.abs(np.asarray(theirs - mine)[1:]).max()


@pytest.mark.parametrize("b2", [0.9, 0.99, 0.999, 0.9999])
def test_length_of_the_moving_average_keeps_its_digits(b2):
    steps = np.concatenate([np.arange(1, 40), [100, 999, 1000, 1001, 5000, 200_000]])
    exact = np.longdouble(b2)
    power = exact**steps
    want = 2 / (1 - exact) - 1 - 2 * steps * power / (1 - power)
    got = np.asarray(jax.vmap(lambda t: rectified.moving_average_length(t, b2))(jnp.asarray(steps, jnp.int32)))
    np.testing.assert_allclose(got, want.astype(float), rtol=3e-6)
    np.testing.assert_array_equal(got > rectified.RECTIFIED_FROM, want > 5)


def test_radam_never_rectifies_a_second_moment_of_two_steps():
    start, grads = arrays(20)
    found = run(optim.RADAM, start, grads, (0.9, 0.5))
    np.testing.assert_allclose(found, numpy_radam(start, grads, betas=(0.9, 0.5)), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("betas", BETAS[:2], ids=str)
def test_lookahead_equals_its_definition(betas):
    start, grads = arrays(20)
    want = numpy_lookahead(start, grads, betas=betas)
    found = run(optim.LOOKAHEAD, start, grads, betas)
    np.testing.assert_allclose(found, want, rtol=3e-6, atol=3e-6)
    alone = run(optim.RADAM, start, grads, betas)
    np.testing.assert_array_equal(found[:5], alone[:5])
    np.testing.assert_allclose(found[5], (start + alone[5]) / 2, rtol=2e-6, atol=2e-7)


def test_lookahead_moves_where_the_parameters_are_also_at_rate_0():
    start, grads = arrays(6)
    found = run(optim.LOOKAHEAD, start, grads, (0.9, 0.999), rates=[RATE] * 5 + [0.0])
    np.testing.assert_allclose(found[5], (start + found[4]) / 2, rtol=1e-6, atol=1e-7)


def test_frozen_groups_and_vectors_without_decay_stay():
    params = {"a": {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, "f": {"w": jnp.full((2, 2), 3.0)}}
    for name in (optim.RADAM, optim.LOOKAHEAD):
        tx = optim.make_optimizer(weight_decay=DECAY, decay_bias=False, trainable=("a",), groups=("a", "f"), name=name)
        state, moved = tx.init(params), params
        for _ in range(7):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, moved)
            moved = optax.apply_updates(moved, jax.tree.map(lambda u: -u, updates))
            moved, state = rectified.settle(tx, moved, state)
        np.testing.assert_array_equal(moved["f"]["w"], params["f"]["w"])
        np.testing.assert_array_equal(moved["a"]["b"], params["a"]["b"])
        assert float(moved["a"]["w"].max()) < 0.8


def test_a_second_rate_of_0_is_refused():
    with pytest.raises(ValueError, match="RAdam needs a second rate above 0"):
        optim.make_optimizer(
            weight_decay=0.0, decay_bias=True, trainable=("a",), groups=("a",), name=optim.RADAM, betas=(0.9, 0.0)
        )


def test_settle_leaves_other_optimizers_alone():
    params, state = {"a": jnp.ones(2)}, object()
    assert rectified.settle(optax.sgd(1.0), params, state) == (params, state)
    assert step.settle is rectified.settle


@pytest.mark.torch
@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_radam_equals_pytorch(betas):
    torch = pytest.importorskip("torch")
    start, grads = arrays()
    p = torch.tensor(start, requires_grad=True)
    theirs = torch.optim.RAdam([p], lr=RATE, betas=betas, weight_decay=DECAY, decoupled_weight_decay=True)
    want = []
    for grad in grads:
        p.grad = torch.tensor(grad)
        theirs.step()
        want.append(p.detach().numpy().copy())
    np.testing.assert_allclose(numpy_radam(start, grads, betas=betas), want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(run(optim.RADAM, start, grads, betas), want, rtol=4e-6, atol=2e-6)


def test_warm_up_of_one_epoch_and_cosine_step_by_step():
    """The customary schedule, counted in steps: up over one epoch, then half a cosine over the rest."""
    train, steps = common.base().train, 7
    train.update({"lr": 1e-3, "lr_schedule": "warmup_cosine", "max_epochs": 4})
    got = np.concatenate([schedules.step_rates(train, epoch, steps) for epoch in range(4)])
    total = 4 * steps
    want = [t / steps if t < steps else 0.5 * (1 + np.cos(np.pi * (t - steps) / (total - steps))) for t in range(total)]
    np.testing.assert_allclose(got, 1e-3 * np.array(want), rtol=1e-12)
    train.lr_schedule = "cosine_to_max_epochs"
    assert len(set(schedules.step_rates(train, 1, steps))) == 1
