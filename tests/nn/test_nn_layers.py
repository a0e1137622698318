"""Layers against NumPy references written from their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.nn import affine
from histokd_jax.nn.fusion import Bilinear, BilinearFusion, ConcatFusion
from histokd_jax.nn.gated_attention import GatedAttention
from histokd_jax.nn.genes import GeneEncoder, TokenSpec, tokenise
from histokd_jax.ops.dropout import alpha_dropout, slot_keep_mask


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def init(module, *args):
    params = module.init(jax.random.key(0), *args)["params"]
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def test_affine_row_and_feature_major_agree():
    params, x = {"kernel": draw(5, 3), "bias": draw(3, seed=1)}, draw(7, 5, seed=2)
    expected = dense(params, x)
    np.testing.assert_allclose(affine.affine(params, x), expected, atol=1e-12)
    columns = {"kernel_t": params["kernel"].T, "bias": params["bias"]}
    np.testing.assert_allclose(affine.affine_columns(columns, x.T), expected.T, atol=1e-12)
    np.testing.assert_allclose(affine.affine_to_columns(columns, x), expected.T, atol=1e-12)


def test_affine_bfloat16_operands_accumulate_in_float32():
    ones = jnp.ones((1, 4096), jnp.float32)
    params = {"kernel": jnp.ones((4096, 1), jnp.float32), "bias": jnp.full(1, 0.5, jnp.float32)}
    y = affine.affine(params, ones, jnp.bfloat16)
    assert y.dtype == jnp.float32 and y[0, 0] == 4096.5


def test_unknown_initialiser():
    with pytest.raises(ValueError, match="torch_default"):
        affine.initializers("xavier", 3)


def test_gated_attention_matches_numpy():
    tokens = draw(3, 4, 6)
    module = GatedAttention(6, 5)
    p = init(module, tokens)
    pooled, weights = module.apply({"params": p}, tokens)
    score = dense(p["score"], np.tanh(dense(p["tanh"], tokens)) * sigmoid(dense(p["sigmoid"], tokens)))[..., 0]
    expected = np.exp(score) / np.exp(score).sum(1, keepdims=True)
    np.testing.assert_allclose(weights, expected, atol=1e-12)
    np.testing.assert_allclose(pooled, (expected[..., None] * tokens).sum(1), atol=1e-12)


def test_bilinear_matches_numpy():
    a, b = draw(3, 4), draw(3, 4, seed=1)
    module = Bilinear(4, 5)
    p = init(module, a, b)
    expected = np.einsum("si,kij,sj->sk", a, p["kernel"], b) + p["bias"]
    np.testing.assert_allclose(module.apply({"params": p}, a, b), expected, atol=1e-12)


def test_bilinear_fusion_matches_numpy():
    a, b = draw(3, 4), draw(3, 4, seed=1)
    module = BilinearFusion(4, inner=3)
    p = init(module, a, b)

    def factor(i, own):
        gate = sigmoid(np.einsum("si,kij,sj->sk", a, p[f"z{i}"]["kernel"], b) + p[f"z{i}"]["bias"])
        o = relu(dense(p[f"o{i}"], gate * relu(dense(p[f"h{i}"], own))))
        return np.concatenate([o, np.ones((3, 1))], 1)

    outer = np.stack([np.kron(x, y) for x, y in zip(factor(1, a), factor(2, b))])
    expected = relu(dense(p["merge"], np.concatenate([relu(dense(p["encode"], outer)), a, b], 1)))
    np.testing.assert_allclose(module.apply({"params": p}, a, b), expected, atol=1e-12)


def test_concat_fusion_matches_numpy():
    a, b = draw(3, 4), draw(3, 4, seed=1)
    module = ConcatFusion(4)
    p = init(module, a, b)
    expected = relu(dense(p["merge"], relu(dense(p["encode"], np.concatenate([a, b], 1)))))
    np.testing.assert_allclose(module.apply({"params": p}, a, b), expected, atol=1e-12)


def test_check_G3_tokenise_keeps_rank_order():
    genes = np.arange(8192.0)[None]
    tokens = tokenise(genes, 512)
    assert tokens.shape == (1, 16, 512)
    for rank in (0, 511, 512, 5000, 8191):
        assert tokens[0, rank // 512, rank % 512] == rank


@pytest.mark.parametrize("total,size", [(10, 4), (3, 4), (0, 4)])
def test_check_G4_indivisible_genes_are_refused(total, size):
    with pytest.raises(ValueError, match="token"):
        tokenise(np.zeros((2, total)), size)


def test_check_G5_alpha_dropout_keeps_moments():
    x = draw(1000, 1000)
    keep = slot_keep_mask(x.shape, jnp.uint32(7), 0.25, 1)
    y = np.asarray(alpha_dropout(jnp.asarray(x), keep, 0.25))
    assert abs(y.mean()) < 0.01 and abs(y.var() - 1) < 0.02
    dropped = 0.867258 * -1.7580993408473766 + 0.381181
    np.testing.assert_allclose(y[~np.asarray(keep)], dropped, atol=2e-6)
    np.testing.assert_allclose(y[np.asarray(keep)], (0.867258 * x + 0.381181)[np.asarray(keep)], atol=1e-5)
    assert abs((~np.asarray(keep)).mean() - 0.25) < 0.002


def test_gene_encoder_matches_numpy():
    genes = 2 * draw(3, 8)
    module = GeneEncoder(TokenSpec(token_size=4, clip=1.5), 6, 5)
    p = init(module, {"genes": genes})
    x = dense(p["tokens"]["proj"], np.clip(genes, -1.5, 1.5).reshape(3, 2, 4))
    tokens = np.where(x > 0, x, np.expm1(x))
    expected, _ = GatedAttention(6, 5).apply({"params": p["attention"]}, tokens)
    np.testing.assert_allclose(module.apply({"params": p}, {"genes": genes}), expected, atol=1e-12)
