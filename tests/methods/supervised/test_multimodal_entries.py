"""TransMIL, MCAT, PORPOISE MMF and SurvPath as runs of the supervised method."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import supervised_setup as setup

from histokd_jax.methods.supervised.config import default_config
from histokd_jax.methods.supervised.method import make_method
from histokd_jax.methods.supervised.networks import network
from histokd_jax.methods.supervised.torch_keys_multimodal import from_torch, to_torch
from histokd_jax.types import DataSpec

GROUPS = (3, 1, 6)
NARROW = {
    "transmil": {"width": 8, "heads": 2, "landmarks": 4, "tile": 8},
    "mcat": {"width": 16},
    "porpoise_mmf": {"width": 16, "patch_width": 8, "attn": 5},
    "survpath": {"width": 16, "attn": 8, "hidden": 5},
}
BOTH = ("mcat", "porpoise_mmf", "survpath")


def config_of(name, **options):
    config = default_config()
    config.update_from_flattened_dict({"data.feat_dim": setup.FEAT, "data.chunk": 8, "model.name": name})
    chosen = {**NARROW[name], **options}
    config.update_from_flattened_dict({f"model.{name}.{k}": v for k, v in chosen.items()})
    return config


def method_of(name, groups=GROUPS, **options):
    data = DataSpec(setup.FEAT, setup.CLASSES, sum(GROUPS), "survival", groups)
    return make_method(config_of(name, **options), data)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "mcat" else n for n in sorted(NARROW)]
)
def test_training_step_and_prediction(name):
    method, batch = method_of(name), setup.batch()
    params, extra = drawn.variables(method.init, jax.random.key(0))

    def loss(params):
        outputs, _ = method.forward(params, {}, extra, batch, jax.random.key(1), True)
        return method.objective(outputs, batch, 0, "supervised")[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    (mode,) = method.modes
    assert mode.name == ("both" if name in BOTH else "pathology")
    shown = method.predict, *([method.attention] if name in BOTH else [])
    out, *maps = jax.jit(lambda p: [function(p, {}, extra, batch, mode.name) for function in shown])(params)
    assert out["hazards"].shape == (len(setup.SIZES), setup.CLASSES) and out["risk"].shape == (len(setup.SIZES),)
    for weights in maps:
        np.testing.assert_allclose(weights.sum(), len(setup.SIZES), rtol=1e-5)


@pytest.mark.parametrize("name", ["mcat", "survpath"])
def test_groups_are_required(name):
    with pytest.raises(ValueError, match="names none"):
        method_of(name, groups=())
    with pytest.raises(ValueError, match="do not describe 10 genes"):
        method_of(name, groups=(3, 3))
    entry = network(name)
    with pytest.raises(ValueError, match="depend on the data"):
        entry.torch(entry.options, 4)


@pytest.mark.parametrize("name", sorted(NARROW))
def test_checkpoint_keys_cover_the_parameters(name):
    method = method_of(name)
    params = drawn.variables(method.init, jax.random.key(0))[0]["network"]
    entry = network(name)
    table = entry.torch({**entry.options, **NARROW[name], "gene_groups": GROUPS}, setup.CLASSES)
    back = from_torch(to_torch(params, table), table)
    jax.tree.map(np.testing.assert_array_equal, back, dict(params))


@pytest.mark.parametrize(
    "name,option,value,message",
    [
        ("transmil", "tile", 0, "transmil.tile = 0"),
        ("transmil", "landmarks", 0, "transmil.landmarks = 0"),
        ("transmil", "heads", 3, "width = 8 .* multiple of 3"),
        ("mcat", "width", 12, "width = 12 .* multiple of 8"),
        ("porpoise_mmf", "scale", 5, "width = 16 .* multiple of 5"),
        ("mcat", "fusion", "none", "fusion"),
    ],
)
def test_impossible_options_are_named(name, option, value, message):
    with pytest.raises(ValueError, match=message):
        method_of(name, **{option: value})


def test_survpath_padding_option_reaches_the_network():
    batch = setup.batch()
    outputs = []
    for padding in ("corrected", "faithful"):
        method = method_of("survpath", padding=padding, bag_size=8)
        params, extra = drawn.variables(method.init, jax.random.key(0))
        run = jax.jit(lambda p, e, m=method: m.forward(p, {}, e, batch, jax.random.key(1), True)[0]["logits"])
        outputs.append(run(params, extra))
    assert jnp.abs(outputs[0] - outputs[1]).max() > 1e-5
    with pytest.raises(ValueError, match="padding"):
        method_of("survpath", padding="zeros")
