"""Image encoders against a float64 reference, their sizes, and what they refuse."""

import dataclasses

import encoder_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.encoders import presets
from histokd_jax.encoders.loading import from_torch
from histokd_jax.nn.encoders import build, specs, vit

IMAGES = np.random.default_rng(1).standard_normal((3, 28, 28, 3)).astype(np.float32)
RESNET_IMAGES = np.random.default_rng(2).standard_normal((2, 45, 38, 3)).astype(np.float32)


def variables_of(spec, state):
    return from_torch(reference.encoder(spec), state, "random")[0]


@pytest.mark.parametrize("name", reference.TINY)
def test_transformer_equals_the_float64_reference(name):
    spec = reference.TINY[name]
    state = reference.random_state(spec)
    found = jax.jit(build.build(spec).apply)(variables_of(spec, state), IMAGES)
    expected = reference.vit_reference(spec, state, IMAGES)
    assert found.shape == (3, spec.features) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("name", reference.RESNETS)
def test_resnet_equals_the_float64_reference(name):
    spec = reference.RESNETS[name]
    state = reference.random_state(spec)
    found = jax.jit(build.build(spec).apply)(variables_of(spec, state), RESNET_IMAGES)
    expected = reference.resnet_reference(spec, state, RESNET_IMAGES)
    assert found.shape == (2, spec.features) and np.ptp(expected, axis=0).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_resnet_in_training_normalises_by_the_batch_and_updates_running_averages():
    spec = reference.RESNETS["keras"]
    variables = build.init(spec, 0)
    module = build.build(spec)
    out, updated = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(
        variables, RESNET_IMAGES
    )
    assert np.isfinite(out).all()
    stem = jax.device_get(variables["params"]["stem"]["conv"])
    y = reference.convolve(np.asarray(RESNET_IMAGES, np.float64), stem["kernel"].transpose(3, 2, 0, 1), 2)
    y = (y + stem["bias"]).reshape(-1, spec.width)
    stats = updated["batch_stats"]["stem"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.01 * y.mean(0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(stats["var"], 0.99 + 0.01 * y.var(0), rtol=1e-5)


def test_half_precision_keeps_the_direction_of_embeddings():
    spec = reference.TINY["uni2_h"]
    variables = variables_of(spec, reference.random_state(spec))
    full, half = (build.build(spec, dtype).apply(variables, IMAGES) for dtype in (None, jnp.bfloat16))
    assert half.dtype == jnp.float32
    assert np.abs(np.asarray(full - half)).max() > 1e-5
    cosine = (full * half).sum(1) / jnp.linalg.norm(full, axis=1) / jnp.linalg.norm(half, axis=1)
    assert cosine.min() > 0.999


def test_position_embeddings_of_another_size_are_resized_as_an_antialiased_bicubic_image():
    from PIL import Image

    rng = np.random.default_rng(0)
    positions = rng.standard_normal((2 + 64, 3)).astype(np.float32)
    for rows, columns in ((5, 12), (16, 16), (8, 3)):
        found = np.asarray(vit.resized_positions(jnp.asarray(positions), 2, 8, rows, columns))
        channels = [
            Image.fromarray(positions[2:, c].reshape(8, 8)).resize((columns, rows), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        expected = np.stack([np.asarray(channel) for channel in channels], -1).reshape(-1, 3)
        np.testing.assert_allclose(found[2:], expected, atol=2e-5)
        np.testing.assert_array_equal(found[:2], positions[:2])
    assert vit.resized_positions(positions, 2, 8, 8, 8) is positions


def test_images_that_cannot_be_cut_into_patches_are_refused():
    module = build.build(reference.TINY["plain"])
    with pytest.raises(ValueError, match="30 x 28 px cannot be cut into patches of 14 px: choose a multiple, e.g. 28"):
        jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 30, 28, 3), jnp.float32))


@pytest.mark.parametrize(
    "change", [{"heads": 3}, {"image": 30}, {"mlp": "relu"}, {"pool": "max"}, {"mlp": "swiglu", "hidden": 7}]
)
def test_impossible_transformers_are_refused(change):
    with pytest.raises(ValueError, match="expected|even"):
        dataclasses.replace(reference.TINY["plain"], **change)
    with pytest.raises(ValueError, match="needs the class token"):
        dataclasses.replace(reference.TINY["mean"], pool="cls")


# --- sizes of the published encoders

PARAMETERS = {
    "uni": 303_350_784,
    "uni2_h": 681_394_176,
    "virchow2": 631_239_424,
    "gigapath": 1_134_953_984,
    "h_optimus_0": 1_134_774_272,
    "phikon": 85_798_656,
    "vit_tiny": 5_524_416,
    "vit_small": 21_665_664,
    "vit_base": 85_798_656,
    "resnet50": 23_508_032,
    "resnet50_clam": 8_543_296,
}
WIDTHS = {
    **{"uni": 1024, "uni2_h": 1536, "virchow2": 2560, "gigapath": 1536, "h_optimus_0": 1536, "phikon": 768},
    **{"vit_tiny": 192, "vit_small": 384, "vit_base": 768, "resnet50": 2048, "resnet50_clam": 1024},
}


def test_the_table_of_sizes_is_complete():
    assert set(PARAMETERS) == set(presets.PRESETS) == set(WIDTHS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_encoders_have_their_published_size(name):
    spec = presets.get(name).spec
    found = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(build.shapes(spec)["params"]))
    assert found == PARAMETERS[name]
    assert spec.features == WIDTHS[name]
    if isinstance(spec, specs.ViTSpec):
        assert specs.vit_parameters(spec) == PARAMETERS[name]


def test_the_keras_variant_has_its_stated_size():
    """methods/more_from_less.md, A2."""
    spec = specs.ResNetSpec(stride_in_3x3=False, conv_bias=True, bn_eps=1.001e-5, bn_momentum=0.99)
    shapes = build.shapes(spec)
    trained, stats = (
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes[c])) for c in ("params", "batch_stats")
    )
    assert (trained, trained + stats) == (23_534_592, 23_587_712)


@pytest.mark.parametrize(
    ("name", "image", "gmacs"),
    [
        ("vit_small", 224, 4.6),
        ("vit_base", 224, 17.6),
        ("uni", 224, 61.6),
        ("resnet50", 224, 4.1),
        ("gigapath", 224, 223),
    ],
)
def test_analytic_arithmetic_agrees_with_published_counts(name, image, gmacs):
    assert specs.forward_flops(presets.get(name).spec, image) / 2e9 == pytest.approx(gmacs, rel=0.03)
