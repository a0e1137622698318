"""A pretrained patch encoder in the place of the random stem: tokens, weights, what is trained, refusals."""

import hmkd_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paired_setup
import pytest

from histokd_jax.encoders import folder, presets
from histokd_jax.methods.hmkd import encoder, images
from histokd_jax.nn.encoders import build
from histokd_jax.nn.paired.encoded import StemEncoder
from histokd_jax.nn.paired.networks import Student
from histokd_jax.train import optim
from histokd_jax.train.state import init_params
from histokd_jax.types import DataSpec

SPEC = "patch=2 width=8 depth=1 heads=2 hidden=16 image=16"
NO_BLOCKS = {"model__student_depths": (0, 0, 0, 0), "model__teacher_depths": (0, 0, 0, 0)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """(encoder folder, its variables)."""
    path = tmp_path_factory.mktemp("encoder") / "vit"
    small = presets.changed(presets.get("vit_tiny"), SPEC.split())
    variables = jax.tree.map(np.asarray, build.init(small.spec, 3))
    folder.save(path, small, variables)
    return path, variables


def config(weights, frozen=True, **changes):
    own = {"name": "vit_tiny", "spec": SPEC, "weights": str(weights), "frozen": frozen}
    return setup.config(**{f"model__encoder__{key}": value for key, value in own.items()}, **NO_BLOCKS, **changes)


def method(*args, **changes):
    return setup.hmkd.make_method(config(*args, **changes), DataSpec(0, setup.CLASSES, image_size=(16, 16)))


ALONE = {"loss__kd_weight": 0.0, "loss__at_weight": 0.0, "loss__cos_weight": 0.0}


def test_the_networks_read_the_tokens_of_the_pretrained_encoder(weights):
    path, variables = weights
    run = method(path, **ALONE)
    params, extra, _ = init_params(run, 0)
    for a, b in zip(jax.tree.leaves(params["student"]["encoder"]), jax.tree.leaves(variables["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    data = setup.batch()
    found = setup.predict(run, params, extra, data, "he")
    stem = encoder.stem_of(config(path))
    seen = (data["image"] / 255.0 - presets.IMAGENET[0]) / presets.IMAGENET[1]
    tokens = paired_setup.once(
        lambda v, x: build.build(stem.spec).apply(v, x, method="tokens"), variables, jnp.asarray(seen, jnp.float32)
    )
    grid = np.asarray(tokens)[:, 1:].reshape(4, 8, 8, 8)
    network = Student(stem.behind(paired_setup.tiny(student_depths=(0, 0, 0, 0))))
    own = {"params": params["student"]["network"], "batch_stats": extra["student"]["network"]}
    expected = paired_setup.once(network.apply, own, grid)
    np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-6)


def test_pixels_are_standardised_as_the_encoder_was_trained():
    cfg = setup.config(model__encoder__name="h_optimus_0", model__encoder__weights="x", model__stem_patch=28)
    stem, transform = encoder.stem_of(cfg), presets.get("h_optimus_0").transform
    pixels = np.linspace(0, 255, 12).reshape(4, 3)
    ours = np.asarray(images.standardise(jnp.asarray(pixels)[None, None]))[0, 0]
    expected = (pixels / transform.scale - np.array(transform.mean)) / np.array(transform.std)
    np.testing.assert_allclose(ours * stem.multiplier + stem.shift, expected, rtol=1e-5, atol=1e-5)
    assert stem.stride == 14 and stem.width == 1536


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_encoder_gets_no_gradient_and_a_trained_one_does(weights, frozen):
    run = method(weights[0], frozen, **ALONE)
    params, extra, _ = init_params(run, 0)
    warm = {**params["student"], "network": setup.warmed(params["student"]["network"])}
    _, found = setup.gradients(run, "student", {"student": warm}, extra, setup.batch(), jax.random.key(1))
    assert (setup.norm(found["student"]["encoder"]) == 0.0) == frozen
    assert setup.norm(found["student"]["network"]) > 0.0
    assert bool(run.stages[0].frozen) == frozen


def test_weight_decay_leaves_frozen_parts_alone():
    params = {"student": {"encoder": jnp.ones(3), "network": {"k": jnp.ones(3)}}, "other": {"network": jnp.ones(2)}}
    tx = optim.make_optimizer(
        weight_decay=0.1, decay_bias=True, trainable=("student",), groups=tuple(params), frozen=("encoder",), name="sgd"
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["student"]["encoder"], params["student"]["encoder"])
    np.testing.assert_array_equal(moved["other"]["network"], params["other"]["network"])
    assert float(updates["student"]["network"]["k"][0]) == pytest.approx(0.1)


def test_trained_encoders_are_one_per_stream_and_a_frozen_one_is_shared(weights):
    for frozen, parts in ((True, {"encoder", "network"}), (False, {"encoder", "partner_encoder", "network"})):
        params, _ = jax.eval_shape(method(weights[0], frozen).init, jax.random.key(0))
        assert set(params["teacher"]) == parts and set(params["student"]) == {"encoder", "network"}


def test_a_residual_network_gives_its_map_and_keeps_its_statistics():
    own = {"name": "resnet50_clam", "spec": "blocks=1 width=4", "weights": "x", "frozen": False}
    cfg = setup.config(**{f"model__encoder__{key}": v for key, v in own.items()}, model__stem_patch=4, **ALONE)
    run = setup.hmkd.make_method(cfg, DataSpec(0, setup.CLASSES, image_size=(32, 32)))
    params, extra = jax.eval_shape(run.init, jax.random.key(0))
    kernel = params["student"]["network"]["stream_a_0"]["patch"]["kernel"]
    assert kernel.shape == (1, 1, 16, 32) and "encoder" in extra["student"]
    data = {**setup.batch(side=32)}
    _, new = jax.eval_shape(lambda p, e: run.forward(p, {}, e, data, jax.random.key(0), True), params, extra)
    assert jax.tree.structure(new) == jax.tree.structure(extra)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"name": "vit_huge"}, "encoder 'vit_huge' is unknown"),
        ({"spec": "colour=3"}, "'colour=3': the architecture of vit_tiny has patch"),
        ({"weights": ""}, "needs model.encoder.weights: a local file"),
        ({"name": ""}, "without model.encoder.name"),
        ({"spec": "patch=4 width=8 depth=1 heads=2 hidden=16 image=16"}, "no multiple of the 4 pixels between"),
    ],
)
def test_settings_that_fit_nothing_are_refused_by_name(weights, changes, message):
    own = {"name": "vit_tiny", "spec": SPEC, "weights": str(weights[0])} | changes
    cfg = setup.config(**{f"model__encoder__{key}": value for key, value in own.items()})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(setup.hmkd.make_method(cfg, DataSpec(0, setup.CLASSES)).init, jax.random.key(0))


def test_weights_that_do_not_exist_or_belong_elsewhere_are_refused(weights, tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a local file"):
        encoder.read_weights(config(tmp_path / "absent.safetensors"))
    deeper = config(weights[0])
    deeper.model.encoder.spec = SPEC.replace("depth=1", "depth=2")
    with pytest.raises(ValueError, match="holds ViTSpec.*depth=1.*but model.encoder.name and.*depth=2"):
        encoder.read_weights(deeper)


def test_images_that_the_encoder_cannot_cut_are_refused(weights):
    with pytest.raises(ValueError, match="cannot be cut into patches of 2 px"):
        setup.hmkd.make_method(config(weights[0]), DataSpec(0, setup.CLASSES, image_size=(17, 16)))


def test_a_stem_of_several_tokens_reads_them_as_one_patch():
    spec = StemEncoder(presets.vit(16, 8, 1, 2)).behind(paired_setup.tiny(stem_patch=32))
    assert (spec.stem_patch, spec.stem_inputs) == (2, 8)
