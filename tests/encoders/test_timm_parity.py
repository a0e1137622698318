"""Parity with timm on random weights, and with the key names and shapes of its full-size models."""

import dataclasses

import encoder_reference as reference
import numpy as np
import pytest
from timm_setup import import_timm, vit_options

from histokd_jax.encoders import presets
from histokd_jax.encoders.loading import from_torch
from histokd_jax.encoders.torch_keys import entries
from histokd_jax.encoders.variables import flatten
from histokd_jax.nn.encoders import build
from histokd_jax.nn.encoders.specs import ResNetSpec

pytestmark = pytest.mark.torch
RNG = np.random.default_rng(0)


def timm_vit(spec, **more):
    timm = import_timm()
    return timm.models.vision_transformer.VisionTransformer(**vit_options(spec), **more).eval()


def randomised(model):
    """Random values of a trained model's size in all parameters and buffers."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.dtype.is_floating_point:
                fan = value[0].numel() if value.ndim > 1 else 10
                value.normal_().mul_(fan**-0.5)
                if (
                    name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "running_var"))
                    or "bn" in name
                ):
                    value.abs_().add_(0.5)
    return model


def outputs(model, encoder, images):
    """(timm's, ours) on normalised NHWC images."""
    import torch

    state = {key: value.numpy() for key, value in model.state_dict().items()}
    variables, unused = from_torch(encoder, state, "timm")
    assert all(key.endswith("num_batches_tracked") for key in unused)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    ours = np.asarray(build.build(encoder.spec).apply(variables, images))
    return theirs, ours


@pytest.mark.parametrize("name", reference.TINY)
def test_transformers_equal_timm(name):
    spec = reference.TINY[name]
    images = RNG.standard_normal((3, 28, 28, 3)).astype(np.float32)
    theirs, ours = outputs(randomised(timm_vit(spec)), reference.encoder(spec), images)
    if spec.pool == "cls_mean":  # as the model card of Virchow2 says
        theirs = np.concatenate([theirs[:, 0], theirs[:, 1 + spec.registers :].mean(1)], -1)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(56, 28), (14, 42)])
@pytest.mark.parametrize("name", ["uni", "uni2_h"])
def test_images_of_another_size_equal_timms_dynamic_size(name, size):
    spec = dataclasses.replace(reference.TINY[name], image=42)
    images = RNG.standard_normal((2, *size, 3)).astype(np.float32)
    model = randomised(timm_vit(spec, dynamic_img_size=True))
    theirs, ours = outputs(model, reference.encoder(spec), images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [(1, 2, 1, 1), (2, 1, 1)])
def test_resnets_equal_timm(blocks):
    timm = import_timm()
    model = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, (*blocks, 1)[:4], num_classes=0)
    model = randomised(model.eval())
    spec = ResNetSpec(blocks)
    images = RNG.standard_normal((2, 64, 48, 3)).astype(np.float32)
    if len(blocks) < 4:
        import torch

        model.layer4 = torch.nn.Identity()
    theirs, ours = outputs(model, reference.encoder(spec), images)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_full_size_models_have_the_keys_and_shapes_we_expect(name):
    """On the device "meta", which holds no values."""
    timm = import_timm()
    import torch

    encoder = presets.get(name)
    spec = encoder.spec
    with torch.device("meta"):
        if isinstance(spec, ResNetSpec):
            model = timm.create_model("resnet50")
        else:
            model = timm.models.vision_transformer.VisionTransformer(**vit_options(spec), weight_init="skip")
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    own = flatten(build.shapes(spec))
    wanted = {
        e.key: e.shape(tuple(own[e.path].shape)[e.layer is not None :], getattr(spec, "patch", 0))
        for e in entries(spec)
    }
    rest = {key for key in theirs if key not in wanted}
    assert {key: theirs.get(key) for key in wanted} == wanted
    assert all(key.startswith(encoder.unused) or key.endswith("num_batches_tracked") for key in rest), rest


NAMED = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5, "num_classes": 0}),
    "gigapath": ("vit_giant_patch14_dinov2", {"img_size": 224, "patch_size": 16, "num_classes": 0}),
    "h_optimus_0": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "num_classes": 0}),
    "phikon": ("vit_base_patch16_224", {"num_classes": 0}),
}


@pytest.mark.parametrize("name", NAMED)
def test_presets_are_timms_models_of_the_names_on_the_model_cards(name):
    timm = import_timm()
    import torch

    model_name, options = NAMED[name]
    with torch.device("meta"):
        model = timm.create_model(model_name, **options)
    spec = presets.get(name).spec
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    own = flatten(build.shapes(spec))
    assert theirs == {
        e.key: e.shape(tuple(own[e.path].shape)[e.layer is not None :], spec.patch) for e in entries(spec)
    }
    assert model.blocks[0].attn.num_heads == spec.heads
