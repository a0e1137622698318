"""CRD (check 11), queues and moving averages as pure state transitions."""

import math

import jax
import jax.numpy as jnp
import loss_arrays as la
import numpy as np
import pytest

from histokd_jax import losses
from histokd_jax.losses import memory


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_check_11_crd_two_call_golden_sequence():
    state, *inputs = la.crd_inputs()
    before = state
    call = jax.jit(losses.crd_loss)
    values, state = call(state, *inputs)
    np.testing.assert_allclose(jnp.mean(values), 44.6330296100, rtol=1e-9)
    np.testing.assert_allclose(state.z_student, 72607706.0584, rtol=1e-10)
    np.testing.assert_allclose(state.z_teacher, 245162.98543752, rtol=1e-12)
    np.testing.assert_allclose(state.student[2], [0.3594326379, -0.9331710341], rtol=1e-8)
    np.testing.assert_allclose(state.teacher[2], [-0.0052951583, -0.9999859806], rtol=1e-8)
    touched = np.array([2, 5, 7, 9])
    others = np.setdiff1d(np.arange(10), touched)
    np.testing.assert_array_equal(state.student[others], before.student[others])
    np.testing.assert_array_equal(state.teacher[others], before.teacher[others])
    np.testing.assert_allclose(np.linalg.norm(state.student[touched], axis=1), 1.0, rtol=1e-12)
    values, second = call(state, *inputs)
    np.testing.assert_allclose(jnp.mean(values), 37.0572891908, rtol=1e-9)
    assert second.z_student == state.z_student and second.z_teacher == state.z_teacher
    # A state that went through a checkpoint gives the same third call.
    restored = memory.CrdState(*(np.array(x) for x in second))
    np.testing.assert_array_equal(call(second, *inputs)[0], call(restored, *inputs)[0])


def test_check_11_crd_float32():
    state, *inputs = la.crd_inputs()
    state, inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if x.dtype == np.float64 else x, (state, inputs))
    values, state = losses.crd_loss(state, *inputs)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(jnp.mean(values), 44.6330296100, rtol=1e-5)
    np.testing.assert_allclose(jnp.mean(losses.crd_loss(state, *inputs)[0]), 37.0572891908, rtol=1e-5)


def test_check_11_crd_equal_similarities():
    """a_ij = 1 / n for all at the first call, so each side is log(1 + K) + K log(1 + 1 / K)."""
    n, k = 12, 4
    state = losses.crd_init(jax.random.key(0), n, 3)
    row = jnp.tile(jnp.array([[1.0, 0.0, 0.0]]), (n, 1))
    state = state._replace(student=row, teacher=row)
    contrast = jnp.tile(jnp.arange(k + 1)[None], (2, 1))
    values, _ = losses.crd_loss(state, row[:2], row[:2], jnp.arange(2), contrast)
    np.testing.assert_allclose(values, 2 * (math.log(1 + k) + k * math.log(1 + 1 / k)), rtol=1e-5)


def test_crd_masked_rows_are_as_absent():
    state, s, t, index, contrast = la.crd_inputs()
    where = np.array([True, False, True, True])
    s_bad = np.where(where[:, None], s, np.nan)
    masked, after = losses.crd_loss(state, s_bad, t, np.where(where, index, 10**6), contrast, where=jnp.asarray(where))
    subset, expected = losses.crd_loss(state, s[where], t[where], index[where], contrast[where])
    np.testing.assert_allclose(masked[where], subset, rtol=1e-12)
    assert masked[1] == 0.0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), after, expected)


def test_crd_duplicate_indices_do_not_depend_on_order():
    state, s, t, index, contrast = la.crd_inputs()
    index = np.array([2, 5, 2, 9], np.int32)
    _, after = losses.crd_loss(state, s, t, index, contrast)
    first = jnp.asarray(0.5 * state.student[2] + 0.5 * s[0] / np.linalg.norm(s[0]))
    np.testing.assert_allclose(after.student[2], first / jnp.linalg.norm(first), rtol=1e-12)
    np.testing.assert_array_equal(memory.first_occurrence(index, jnp.ones(4, bool)), [True, True, False, True])


def test_crd_gradient_reaches_both_sides_and_no_memory():
    state, *inputs = la.crd_inputs()

    def loss(s, t, memories):
        values, after = losses.crd_loss(state._replace(student=memories, ready=True), s, t, *inputs[2:])
        return jnp.sum(values), after

    (g_s, g_t, _), after = jax.grad(loss, (0, 1, 2), has_aux=True)(inputs[0], inputs[1], state.student)
    assert np.abs(g_s).max() > 0 and np.abs(g_t).max() > 0
    moved = jax.grad(lambda s: jnp.sum(losses.crd_loss(state, s, *inputs[1:])[1].student))(inputs[0])
    np.testing.assert_array_equal(moved, 0.0)


@pytest.mark.parametrize("mode", memory.MODES)
def test_contrast_lists_hold_what_the_mode_says(mode):
    labels = jnp.array([0, 0, 1, 1, 2, 2, 2, 0])
    index = jnp.array([0, 4, 3])
    found = np.asarray(losses.draw_contrast(jax.random.key(1), index, labels, 4, mode=mode))
    assert found.shape == (3, 5)
    for row, i in zip(found, index):
        assert len(set(row[1:])) == 4, "without replacement where there are enough"
        if mode == memory.UNLABELLED:
            assert row[0] == i and i not in row[1:]
        else:
            assert not np.any(labels[row[1:]] == labels[i])
            assert row[0] == i if mode == memory.EXACT else labels[row[0]] == labels[i]


def test_contrast_repeats_where_candidates_are_few():
    found = losses.draw_contrast(jax.random.key(0), jnp.array([0]), jnp.array([0, 0, 1]), 6)
    np.testing.assert_array_equal(found[0], [0, 2, 2, 2, 2, 2, 2])


def queue_reference(keys, query, key, tau):
    norm = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k = norm(query), norm(key)
    logits = np.concatenate([np.sum(q * k, -1, keepdims=True), q @ np.asarray(keys).T], 1) / tau
    return np.log(np.exp(logits).sum(1)) - logits[:, 0]


def test_queue_against_numpy_and_as_a_ring():
    rng = np.random.default_rng(0)
    state, seen = losses.queue_init(5, 3), []
    for _ in range(4):
        query, key = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
        values, state = jax.jit(losses.queue_infonce)(state, query, key)
        expected = queue_reference(np.array(seen[-5:]).reshape(-1, 3), query, key, 0.07)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
        seen += list(key / np.linalg.norm(key, axis=1, keepdims=True))
    assert state.filled == 5 and state.position == 8 % 5
    np.testing.assert_allclose(np.sort(state.keys, axis=0), np.sort(np.array(seen[-5:]), axis=0), rtol=1e-6)


def test_queue_keeps_no_masked_row():
    state = losses.queue_push(losses.queue_init(4, 2), jnp.eye(2), where=jnp.array([False, True]))
    assert state.filled == 1 and state.position == 1
    np.testing.assert_array_equal(state.keys[0], [0.0, 1.0])
    np.testing.assert_array_equal(state.keys[1:], 0.0)
    with pytest.raises(ValueError, match="does not fit into a queue"):
        losses.queue_push(state, jnp.ones((5, 2)))


def test_momentum_update_is_an_average_without_gradient():
    tree = {"a": jnp.ones(2), "b": jnp.zeros(1)}
    moved = losses.momentum_update(tree, jax.tree.map(lambda x: x + 1.0, tree), 0.75)
    np.testing.assert_allclose(moved["a"], 1.25)
    np.testing.assert_allclose(moved["b"], 0.25)
    np.testing.assert_array_equal(jax.grad(lambda f: losses.momentum_update(jnp.ones(2), f, 0.5).sum())(jnp.ones(2)), 0)


def test_memory_refuses_other_shapes():
    state, s, t, index, contrast = la.crd_inputs()
    with pytest.raises(ValueError, match="crd_loss needs student and teacher"):
        losses.crd_loss(state, la.ES, la.VT, index, contrast)
    with pytest.raises(ValueError, match="contrast mode"):
        losses.draw_contrast(jax.random.key(0), index, jnp.zeros(10, jnp.int32), 2, mode="hard")
