"""Connectors of vectors and maps: shapes, rules of the hint regressor, fusion against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.losses import hcl_loss, hint_errors
from histokd_jax.nn.connectors import Connector
from histokd_jax.nn.map_connectors import HintRegressor, Paraphraser, ReviewFusion, Translator

KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_a_linear_connector_is_a_matrix_on_the_channels_of_vectors_and_maps():
    module = Connector(5)
    x = normal(2, 3, 4, 4)
    params = module.init(KEY, x)
    kernel, bias = (np.asarray(params["params"]["layer_0"][name]) for name in ("kernel", "bias"))
    expected = np.einsum("bchw,cd->bdhw", x, kernel) + bias[None, :, None, None]
    np.testing.assert_allclose(module.apply(params, x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(module.apply(params, x[:, :, 0, 0]), expected[:, :, 0, 0], rtol=1e-5, atol=1e-6)
    assert set(Connector(5, "mlp").init(KEY, x)["params"]) == {"layer_0", "layer_1", "layer_2"}


@pytest.mark.parametrize("student,teacher", [(8, 4), (4, 8), (6, 6), (7, 5)])
def test_hint_regressor_reaches_the_teachers_shape(student, teacher):
    module = HintRegressor(5, teacher)
    x = normal(2, 3, student, student)
    out, state = module.apply(module.init(KEY, x), x, train=True, mutable=["batch_stats"])
    assert out.shape == (2, 5, teacher, teacher) and jnp.min(out) >= 0 and "norm" in state["batch_stats"]
    assert hint_errors(out, normal(2, 5, teacher, teacher)).shape == (2,)
    below = HintRegressor(5, teacher, relu=False)
    assert jnp.min(below.apply(below.init(KEY, x), x, train=True, mutable=["batch_stats"])[0]) < 0


def test_hint_regressor_without_a_rule_is_refused():
    with pytest.raises(ValueError, match="size 3 has no hint regressor to size 5"):
        HintRegressor(5, 5).init(KEY, normal(1, 2, 3, 3))


def test_factors_have_half_of_the_teachers_channels():
    teacher, student = normal(2, 6, 4, 4), normal(2, 4, 4, 4)
    paraphraser, translator = Paraphraser(), Translator(6)
    factor, back = jax.jit(lambda x: paraphraser.apply(paraphraser.init(KEY, x), x))(teacher)
    assert factor.shape == (2, 3, 4, 4) and back.shape == teacher.shape
    variables = jax.eval_shape(translator.init, KEY, student)
    assert jax.eval_shape(translator.apply, variables, student).shape == factor.shape and "batch_stats" in variables


def test_review_fusion_reaches_every_level_and_passes_deep_information_up():
    shapes = [(6, 8, 8), (8, 4, 4), (10, 1, 1)]
    maps = [normal(2, 3, 8, 8), normal(2, 4, 4, 4), normal(2, 5, 1, 1)]
    module = ReviewFusion(tuple(shapes))
    variables = jax.jit(module.init)(KEY, maps)
    run = jax.jit(lambda m: module.apply(variables, m))
    out = run(maps)
    assert [x.shape[1:] for x in out] == shapes
    assert [hcl_loss(x, normal(2, *s)).shape for x, s in zip(out, shapes)] == [(2,)] * 3
    changed = run([*maps[:2], maps[2] + 1.0])
    assert all(float(jnp.abs(a - b).max()) > 0 for a, b in zip(out, changed)), "the deepest map reaches all levels"
    shallow = run([maps[0] + 1.0, *maps[1:]])
    np.testing.assert_array_equal(shallow[2], out[2])
    with pytest.raises(ValueError, match="2 levels and the teacher 3"):
        module.init(KEY, maps[:2])
