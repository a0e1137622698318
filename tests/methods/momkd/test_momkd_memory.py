"""Memories against hand-made numbers and an independent NumPy version: checks 1 to 5, 8, 9 and 17."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.methods.momkd import memory

F = np.array([0.6, 0.8])
POS, NEG = np.array([[1.0, 0], [0, 1]]), np.array([[-1.0, 0], [0.8, -0.6]])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def both(pos, neg):
    """Memories as one array: row 0 is that of class 0."""
    return jnp.stack([jnp.asarray(neg), jnp.asarray(pos)])


def loss(f, pos, neg, y):
    return float(memory.align_loss(jnp.asarray(f)[None], both(pos, neg), jnp.array([y]))[0])


def rotation(rng, d):
    return np.linalg.qr(rng.normal(size=(d, d)))[0]


def random_case(seed=0, n=4, d=5):
    rng = np.random.default_rng(seed)
    f = rng.normal(size=d)
    return rng, f / np.linalg.norm(f), rng.normal(size=(n, d)), rng.normal(size=(n, d))


def test_C1_alignment_fixture():
    assert float(memory.soft_angle(jnp.asarray(F), jnp.asarray(POS), 5.0)) == pytest.approx(0.8626523375, abs=1e-10)
    assert float(memory.soft_angle(jnp.asarray(F), jnp.asarray(NEG), 5.0)) == pytest.approx(0.0097174703, abs=1e-10)
    assert loss(F, POS, NEG, 1) == pytest.approx(1.5749448e-05, abs=1e-12)
    # The specification prints 23.0586973874, which lacks two digits of 23.05869734387.
    gap = 0.2 * (4 + np.log1p(np.exp(-1))) - 0.2 * np.log1p(np.exp(-3))
    assert loss(F, POS, NEG, 0) == pytest.approx(20 * (0.3 + gap) + np.log1p(np.exp(-20 * (0.3 + gap))), abs=1e-12)
    assert loss(F, POS, NEG, 0) == pytest.approx(23.0586973874, abs=1e-7)


def test_C2_attention_fixture():
    q = jnp.array([[1.0, 0], [0, 1], [-1, 0]])
    np.testing.assert_allclose(memory.memory_scores(q, both(POS, NEG)), [0.2, 1.0, -1.0], atol=1e-12)
    weights = memory.memory_attention(q, both(POS, NEG), 0.2, jnp.ones(3, jnp.int32), 1)
    np.testing.assert_allclose(weights, [0.0179854, 0.9819700, 0.0000446], atol=1e-7)


def test_C3_soft_maximum_lies_between_the_maximum_and_log_n_above_it():
    _, f, codes, _ = random_case()
    largest = (codes / np.linalg.norm(codes, axis=1, keepdims=True) @ f).max()
    for tau in (0.5, 5.0, 50.0):
        phi = float(memory.soft_angle(jnp.asarray(f), jnp.asarray(codes), tau))
        assert largest <= phi <= largest + np.log(len(codes)) / tau
    assert float(memory.soft_angle(jnp.asarray(f), jnp.asarray(codes), 1e5)) == pytest.approx(largest, abs=1e-4)
    same = np.tile(codes[:1], (4, 1))
    expected = same[0] @ f / np.linalg.norm(same[0]) + np.log(4) / 5
    assert float(memory.soft_angle(jnp.asarray(f), jnp.asarray(same), 5.0)) == pytest.approx(expected, abs=1e-12)


def test_C4_symmetry_monotony_rotation_and_scale():
    rng, f, pos, neg = random_case()
    for y in (0, 1):
        here = loss(f, pos, neg, y)
        assert here == pytest.approx(loss(f, neg, pos, 1 - y), abs=1e-12)
        turn = rotation(rng, 5)
        assert here == pytest.approx(loss(f @ turn, pos @ turn, neg @ turn, y), abs=1e-10)
        scale = rng.uniform(0.1, 9, (4, 1))
        assert here == pytest.approx(loss(f, pos * scale, neg / scale, y), abs=1e-10)
    gaps = jnp.linspace(-1.5, 1.5, 31)
    for y in (0, 1):
        values = memory.margin_loss((2 * y - 1) * gaps, jnp.full(31, y), 20.0, 0.3)
        assert np.all(np.diff(values) < 0)


def test_C5_orthogonality_of_codes():
    rng = np.random.default_rng(0)
    orthonormal = rotation(rng, 6)[:4]
    assert float(memory.orth_codes(jnp.asarray(orthonormal))) == pytest.approx(0, abs=1e-12)
    assert float(memory.orth_codes(jnp.asarray(np.tile(orthonormal[:1], (4, 1))))) == pytest.approx(0.75, abs=1e-12)
    assert float(memory.orth_codes(jnp.asarray(NEG))) == pytest.approx(0.32, abs=1e-12)
    codes = rng.normal(size=(4, 6))
    scaled = codes * rng.uniform(0.1, 9, (4, 1))
    assert float(memory.orth_codes(jnp.asarray(scaled))) == pytest.approx(float(memory.orth_codes(jnp.asarray(codes))))


def commit_case(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(7, 5)), rng.normal(size=(2, 4, 5)), np.array([0, 1, 1, 0, 1, 0, 0])


def test_commitment_equals_numpy_with_raw_codes_of_the_own_class():
    q, codes, label = commit_case()
    expected = []
    for vector, y in zip(q, label):
        j = np.argmin([np.linalg.norm(vector - c) for c in codes[y]])
        expected.append(((vector - codes[y, j]) ** 2).mean())
    np.testing.assert_allclose(memory.commit_loss(*map(jnp.asarray, (q, codes, label))), expected, atol=1e-12)


@pytest.mark.parametrize("move", [False, True])
def test_C8_commitment_moves_codes_only_if_asked_to(move):
    q, codes, label = map(jnp.asarray, commit_case())
    total = jax.jit(jax.grad(lambda q, c: jnp.sum(memory.commit_loss(q, c, label, move)), (0, 1)))
    g_q, g_codes = total(q, codes)
    assert np.abs(g_q).min(axis=1).max() > 0
    chosen = np.unique(memory.own_codes(q, codes, label))
    moved = np.flatnonzero(np.abs(g_codes).sum(axis=2).reshape(-1))
    np.testing.assert_array_equal(moved, chosen if move else [])


def test_C9_equal_memories_give_uniform_attention_over_real_patches():
    rng, _, codes, _ = random_case()
    q = memory.normalise(jnp.asarray(rng.normal(size=(9, 5))))
    segments = jnp.array([1, 1, 1, 1, 2, 2, 0, 0, 2])
    weights = memory.memory_attention(q, both(codes, codes), 0.2, segments, 2)
    np.testing.assert_allclose(weights, [0.25] * 4 + [1 / 3] * 2 + [0, 0, 1 / 3], atol=1e-12)


def test_temperature_is_clipped_without_gradient_outside():
    for tau, expected, slope in ((0.2, 0.2, 0.2), (0.001, 0.01, 0.0), (9.0, 2.0, 0.0)):
        value, gradient = jax.value_and_grad(memory.temperature)(jnp.log(tau))
        np.testing.assert_allclose([value, gradient], [expected, slope], atol=1e-12)


def test_C17_moving_average_at_both_ends_and_between():
    q, codes, label = commit_case()
    codes = codes / np.linalg.norm(codes, axis=2, keepdims=True)
    where = np.array([True] * 6 + [False])
    arrays = [jnp.asarray(x) for x in (codes, q, label, where)]
    np.testing.assert_array_equal(memory.moved(*arrays, 1.0), codes)
    for m in (0.0, 0.9):
        expected = codes.copy()
        for y in (0, 1):
            nearest = np.array([np.argmin(((vector - codes[y]) ** 2).sum(axis=1)) for vector in q])
            for j in range(4):
                mine = (nearest == j) & (label == y) & where
                if mine.any():
                    new = m * codes[y, j] + (1 - m) * q[mine].mean(axis=0)
                    expected[y, j] = new / np.linalg.norm(new)
        np.testing.assert_allclose(memory.moved(*arrays, m), expected, atol=1e-12)
        assert (expected != codes).any() and (expected == codes).all(axis=2).any(), "some codes get no patch"


def test_normalisation_of_zero_is_zero_with_zero_gradient():
    gradient = jax.grad(lambda x: jnp.sum(memory.normalise(x)))(jnp.zeros(3))
    assert not np.any(memory.normalise(jnp.zeros(3))) and not np.any(gradient)
