"""Weights from checkpoints, from folders of our own, and random ones: used exactly once, or named."""

import dataclasses
import json

import encoder_reference as reference
import jax
import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.torch_file import write_state_dict
from histokd_jax.encoders import folder, loading, presets
from histokd_jax.encoders.loading import WeightsError, from_torch
from histokd_jax.encoders.torch_keys import entries, plain_names
from histokd_jax.encoders.variables import fingerprint, flatten, unflatten
from histokd_jax.nn.encoders import build

SPEC = reference.TINY["uni2_h"]
ENCODER = reference.encoder(SPEC)
STATE = reference.random_state(SPEC)
IMAGES = np.random.default_rng(1).standard_normal((2, 28, 28, 3)).astype(np.float32)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_variable_of_a_published_encoder_has_exactly_its_tensors(name):
    spec = presets.get(name).spec
    own, wanted = flatten(build.shapes(spec)), entries(spec)
    assert len({entry.key for entry in wanted}) == len(wanted)
    filled = {}
    for entry in wanted:
        filled.setdefault(entry.path, []).append(entry.layer)
    assert set(filled) == set(own)
    for path, layers in filled.items():
        assert layers == ([None] if layers[0] is None else list(range(own[path].shape[0])))


def test_missing_unknown_and_misshapen_tensors_are_named_in_one_message():
    state = dict(STATE)
    del state["blocks.1.ls1.gamma"]
    state["blocks.3.norm1.weight"] = np.ones(24, np.float32)
    state["norm.bias"] = np.ones(25, np.float32)
    state["head.weight"] = np.ones((5, 24), np.float32)
    with pytest.raises(WeightsError) as caught:
        from_torch(ENCODER, state, "weights.pt")
    text = str(caught.value)
    assert "weights.pt" in text and "missing keys: blocks.1.ls1.gamma" in text
    assert "unknown keys: blocks.3.norm1.weight" in text and "head.weight" not in text
    assert "norm.bias has shape (25,), expected (24,)" in text


@pytest.mark.parametrize("other", ["plain", "virchow2", "uni"])
def test_weights_of_another_architecture_are_refused(other):
    with pytest.raises(WeightsError, match="not weights of the encoder tiny"):
        from_torch(ENCODER, reference.random_state(reference.TINY[other]), "other.pt")


def test_weights_of_another_width_are_refused_by_shape():
    wider = dataclasses.replace(reference.TINY["plain"], width=32)
    with pytest.raises(WeightsError, match=r"cls_token has shape \(1, 1, 32\), expected \(1, 1, 16\)"):
        from_torch(reference.encoder(reference.TINY["plain"]), reference.random_state(wider), "wider.pt")


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"image": 42}, "--spec image=42"),
        ({"embed_prefix": True}, "--spec embed_prefix=true"),
        ({"image": 42, "embed_prefix": True}, "--spec image=42 and --spec embed_prefix=true"),
    ],
)
def test_position_embeddings_of_another_length_are_explained(change, hint):
    state = reference.random_state(dataclasses.replace(SPEC, **change))
    with pytest.raises(WeightsError, match=r"expected 4 \(2 x 2 patches, without class and registers\).*") as caught:
        from_torch(ENCODER, state, "positions.pt")
    assert hint in str(caught.value)
    settings = [part.split()[0].rstrip(".") for part in hint.split("--spec ")[1:]]
    from_torch(presets.changed(ENCODER, settings), state, "positions.pt")


@pytest.mark.parametrize(
    ("value", "match"), [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (1, "int64, expected floating")]
)
def test_values_that_are_no_finite_numbers_are_refused(value, match):
    state = STATE | {"norm.bias": np.full(24, value)}
    with pytest.raises(WeightsError, match=f"norm.bias holds .*{match}|norm.bias holds {match}"):
        from_torch(ENCODER, state, "bad.pt")


def test_clams_cut_names_what_it_does_not_use():
    whole = dataclasses.replace(reference.RESNETS["torchvision"], blocks=(1, 1, 1, 1))
    state = reference.random_state(whole) | {"fc.weight": np.ones((3, 32), np.float32)}
    state |= {key.replace("running_mean", "num_batches_tracked"): np.int64(1) for key in state if "running_mean" in key}
    cut = dataclasses.replace(
        presets.get("resnet50_clam"), spec=dataclasses.replace(whole, blocks=(1, 1, 1)), transform=reference.SMALL
    )
    variables, unused = from_torch(cut, state, "resnet.pth")
    assert "fc.weight" in unused and "layer4.0.conv1.weight" in unused
    assert all(key.startswith(("layer4.", "fc.")) or key.endswith("num_batches_tracked") for key in unused)
    found = build.build(cut.spec).apply(variables, IMAGES)
    np.testing.assert_allclose(found, reference.resnet_reference(cut.spec, state, IMAGES), rtol=1e-4, atol=1e-5)


# --- files


def test_equal_weights_have_one_fingerprint_whatever_the_file(tmp_path):
    from safetensors.numpy import save_file

    write_state_dict(tmp_path / "a.pt", STATE)
    write_state_dict(tmp_path / "b.bin", {f"backbone.{key}": value for key, value in STATE.items()})
    save_file({key: np.ascontiguousarray(value) for key, value in STATE.items()}, tmp_path / "c.safetensors")
    loaded = [loading.load(ENCODER, tmp_path / name) for name in ("a.pt", "b.bin", "c.safetensors")]
    assert len({item.sha256 for item in loaded}) == 1 and loaded[2].weights == "c.safetensors"
    changed = STATE | {"norm.bias": STATE["norm.bias"] + np.float32(1e-6)}
    assert fingerprint(from_torch(ENCODER, changed, "d")[0]) != loaded[0].sha256
    facts = loaded[0].facts()
    assert facts == json.loads(json.dumps(facts)) and facts["weights_sha256"] == loaded[0].sha256


def transformers_names(state, dinov2):
    """A state dict as transformers' ViTModel or Dinov2Model call it."""
    result = {}
    for key, value in state.items():
        stem, _, end = key.rpartition(".")
        if ".attn.qkv" in key:
            for name, part in zip(("query", "key", "value"), np.split(value, 3)):
                result[f"encoder.layer.{key.split('.')[1]}.attention.attention.{name}.{end}"] = part
            continue
        stem = stem.replace("blocks.", "encoder.layer.").replace("attn.proj", "attention.output.dense")
        stem = stem.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        if dinov2:
            swiglu = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"} if "gate" in dinov2 else {}
            for old, new in {"ls1": "layer_scale1", "ls2": "layer_scale2", **swiglu}.items():
                stem = stem.replace(old, new)
            end = "lambda1" if end == "gamma" else end
        else:
            for old, new in {"norm1": "layernorm_before", "norm2": "layernorm_after"}.items():
                stem = stem.replace(old, new)
            stem = stem.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        singles = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
        singles |= {"reg_token": "embeddings.register_tokens"}
        stem = "layernorm" if stem == "norm" else stem
        result[singles.get(key, f"{stem}.{end}")] = value
    return result


@pytest.mark.parametrize(("name", "dinov2"), [("plain", ""), ("uni", "dinov2"), ("virchow2", "dinov2, gate")])
def test_names_of_transformers_are_understood(name, dinov2):
    spec = reference.TINY[name]
    state = reference.random_state(spec)
    other = transformers_names(state, dinov2)
    assert not set(other) & set(state)
    found = plain_names(other)
    assert set(found) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(found[key], value)


def test_a_lost_key_of_transformers_is_named():
    other = transformers_names(reference.random_state(reference.TINY["plain"]), "")
    del other["encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(WeightsError, match=r"missing keys: blocks.1.attn.qkv.weight; unknown keys: .*query.weight"):
        from_torch(reference.encoder(reference.TINY["plain"]), other, "vit.bin")


# --- folders of our own


@pytest.mark.parametrize("spec", [reference.TINY["virchow2"], reference.RESNETS["keras"]], ids=["vit", "resnet"])
def test_an_encoder_of_our_own_survives_its_folder(tmp_path, spec):
    encoder = reference.encoder(spec, name="mine", mpp=(0.5, 1.0), licence="ours")
    variables = build.init(spec, 3)
    written = folder.save(tmp_path / "a", encoder, variables, method="self-supervised", steps=10)
    folder.save(tmp_path / "b", encoder, jax.device_get(variables), method="self-supervised", steps=10)
    for name in ("encoder.json", "weights.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = loading.load_folder(tmp_path / "a")
    assert loaded.sha256 == written
    assert loaded.encoder == dataclasses.replace(encoder, unused=())
    for path, value in flatten(variables).items():
        np.testing.assert_array_equal(flatten(loaded.variables)[path], value)


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    variables = loading.random(ENCODER, 0).variables
    folder.save(tmp_path / "a", ENCODER, variables)
    with pytest.raises(DataError, match="no encoder folder, .*encoder.json does not exist"):
        folder.load(tmp_path)
    with pytest.raises(DataError, match="arrays do not fit the architecture of tiny"):
        folder.save(tmp_path / "b", reference.encoder(reference.TINY["uni"]), variables)
    flat = {path: np.array(value) for path, value in flatten(variables).items()}
    flat["params/norm/bias"][0] += 1
    np.savez(tmp_path / "a" / "weights.npz", **flat)
    with pytest.raises(DataError, match="differs from its hash"):
        folder.load(tmp_path / "a")
    (tmp_path / "a" / "weights.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="cannot be read"):
        folder.load(tmp_path / "a")


def test_random_weights_are_reproducible_and_say_so():
    one, same, other = (loading.random(ENCODER, seed) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    assert one.weights == "RANDOM, NOT TRAINED (seed 1)"
    found = build.build(SPEC).apply(one.variables, IMAGES)
    assert np.ptp(np.asarray(found), axis=0).mean() > 1e-2, "random weights must tell images apart"


def test_settings_change_an_architecture_or_are_refused():
    changed = presets.changed(presets.get("uni"), ["image=256", "layer_scale=false"])
    assert (changed.spec.image, changed.spec.layer_scale, changed.transform.size) == (256, False, 256)
    assert changed.name == "uni (image=256, layer_scale=false)"
    assert presets.changed(presets.get("resnet50"), ["blocks=1,2"]).spec.blocks == (1, 2)
    for text, match in (
        ("size=3", "has patch, width"),
        ("depth=x", "expected a int"),
        ("qkv_bias=1", "expected a bool"),
    ):
        with pytest.raises(ValueError, match=match):
            presets.changed(presets.get("uni"), [text])
    with pytest.raises(ValueError, match="known: vit_tiny, "):
        presets.get("uni3")


def test_trees_survive_flat_names():
    tree = {"params": {"a": {"b": 1}, "c": 2}, "batch_stats": {"d": 3}}
    assert unflatten(flatten(tree)) == tree
    assert list(flatten(tree)) == ["batch_stats/d", "params/a/b", "params/c"]
