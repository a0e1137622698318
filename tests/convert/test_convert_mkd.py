"""Checkpoints of MKD through `histokd convert`: used, dead, missing and unknown tensors, prediction, round trip."""

import golden_fill as gf
import jax
import numpy as np
import pytest
import tiny

from data_pipelines.simulate import simulate_cohort
from data_pipelines.torch_file import read_state_dict, write_state_dict
from histokd_jax.cli.main import main
from histokd_jax.convert import models
from histokd_jax.convert.adapters import adapters
from histokd_jax.convert.matching import ConversionError, match
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.methods.mkd import torch_keys
from histokd_jax.utils import config

NETWORKS = {"S_P": "mkd_s_p", "T_M": "mkd_t_m", "T_G": "mkd_t_g"}


def golden(folder, group):
    return {key: value.astype(np.float32) for key, value in gf.state_dict(folder, NETWORKS[group]).items()}


@pytest.fixture
def full_config():
    return lambda *extra: config.load("configs/mkd.py:er", ["genes.top_k=2048", *extra])


def small_state(group="S_P", feat_dim=12, width=8, attn=4, classes=2, seed=0):
    """A student with the widths of the tiny configuration, under the authors' names."""
    rng = np.random.default_rng(seed)

    def layer(name, fan_in, out):
        return {
            f"{name}.weight": (rng.normal(size=(out, fan_in)) / np.sqrt(fan_in)).astype(np.float32),
            f"{name}.bias": (rng.normal(size=out) / 10).astype(np.float32),
        }

    return {
        **layer("_fc1.0", feat_dim, width),
        **layer("attention.attention_V.0", width, attn),
        **layer("attention.attention_U.0", width, attn),
        **layer("attention.attention_weights", attn, 1),
        **layer("classifier.fc", width, classes),
    }


def numpy_student(state, patches):
    """Logits of one bag in float64 (MKD sections 4.1 and 4.2)."""
    s = {key: value.astype(np.float64) for key, value in state.items()}

    def affine(name, x):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    h = np.maximum(affine("_fc1.0", patches.astype(np.float64)), 0)
    gate = np.tanh(affine("attention.attention_V.0", h)) / (1 + np.exp(-affine("attention.attention_U.0", h)))
    score = affine("attention.attention_weights", gate)[:, 0]
    weight = np.exp(score - score.max())
    return affine("classifier.fc", weight @ h / weight.sum())


@pytest.mark.parametrize("group", NETWORKS)
def test_golden_checkpoints_and_dead_tensors(golden_dir, tmp_path, full_config, group):
    state = golden(golden_dir, group)
    write_state_dict(tmp_path / "x.pt", state)
    converted = models.from_checkpoints(full_config(), {group: tmp_path / "x.pt"})
    dead = [key for key in state if key.startswith("classifier.")] if group == "T_G" else []
    matched = converted.matched[group]
    assert list(matched.dead) == dead and len(matched.tensors) == len(state) - len(dead)
    assert matched.summary().startswith(f"{len(state) - len(dead)} of {len(state)} tensors used")
    assert converted.spec.num_classes == 2 and converted.spec.feat_dim == 1024
    expected = torch_keys.from_torch(state, group)
    jax.tree.map(np.testing.assert_array_equal, dict(converted.params[group]), expected)


def test_round_trip_is_bit_equal_in_both_formats(golden_dir, tmp_path, full_config):
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    state = golden(golden_dir, "S_P")
    write_state_dict(tmp_path / "x.pt", state)
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.safetensors"):
        out = tmp_path / f"model_{name}"
        arguments = ["convert", f"S_P={tmp_path / name}", "--config", "configs/mkd.py:er", "--out", str(out)]
        assert main(arguments) == 0
        assert main(["convert", str(out), "--to-torch", "--out", str(tmp_path / "back.pt")]) == 0
        back = read_state_dict(tmp_path / "back.pt")
        assert set(back) == set(state)
        for key, value in state.items():
            assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


@pytest.mark.torch
def test_torch_checkpoint_in_and_weights_only_load_out(tmp_path):
    torch = pytest.importorskip("torch")
    state = {key: torch.from_numpy(value) for key, value in small_state().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "x.pt")
    settings = [f"--config.{key}={value}" for key, value in tiny.SETTINGS.items()]
    out = tmp_path / "model"
    assert main(["convert", f"S_P={tmp_path / 'x.pt'}", "--config", tiny.CONFIG, "--out", str(out), *settings]) == 0
    assert main(["convert", str(out), "--to-torch", "--out", str(tmp_path / "back.pt")]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert set(back) == set(state) and all(torch.equal(back[key], state[key]) for key in state)


def test_a_converted_student_predicts_as_its_weights_say(tmp_path, capsys):
    simulate_cohort(tmp_path / "data", tiny.SPEC)
    state = small_state()
    write_state_dict(tmp_path / "x.pt", state)
    settings = [f"--config.{key}={value}" for key, value in tiny.SETTINGS.items()]
    checkpoint, out = f"S_P={tmp_path / 'x.pt'}", str(tmp_path / "model")
    names = ["--classes", "no,yes", "--encoder", "toy"]
    assert main(["convert", checkpoint, "--config", tiny.CONFIG, "--out", out, *names, *settings]) == 0
    shown = capsys.readouterr().out
    assert "S_P: 10 of 10 tensors used" in shown and "width 12, 2 outputs" in shown
    table = tmp_path / "p.csv"
    assert main(["predict", "--model", out, "--data", str(tmp_path / "data"), "--out", str(table)]) == 0
    predictions = read_predictions(table)
    from data_pipelines.reader import BagReader

    reader = BagReader(tmp_path / "data")
    rows = {slide.slide_id: row for row, slide in enumerate(reader.manifest.slides)}
    for slide_id, probs in zip(predictions.slide_id, predictions.probs):
        logits = numpy_student(state, reader.read_bag(rows[slide_id])[0])
        expected = np.exp(logits - logits.max())
        np.testing.assert_allclose(probs, expected / expected.sum(), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("attention.attention_U.0.bias"), "missing keys: attention.attention_U.0.bias"),
        (lambda s: s.update({"extra.weight": np.zeros(2, "f4")}), "unknown keys: extra.weight"),
        (
            lambda s: s.update({"attention.attention_V.0.weight": np.zeros((5, 8), "f4")}),
            r"V.0.weight has shape \(5, 8\), expected \(4, 8\)",
        ),
        (lambda s: s.update({"_fc1.0.bias": np.full(8, np.nan, "f4")}), "_fc1.0.bias holds NaN"),
        (lambda s: s.update({"_fc1.0.bias": np.zeros(8, "i4")}), "_fc1.0.bias holds int32"),
        (lambda s: s.pop("_fc1.0.weight"), "_fc1.0.weight is missing"),
        (lambda s: s.update({"classifier.fc.weight": np.float32(1)}), r"classifier.fc.weight has shape \(\)"),
        (lambda s: s.update({"module.classifier.fc.weight": s["classifier.fc.weight"]}), "name the same layer"),
    ],
)  # fmt: skip
def test_deviations_name_the_key(tmp_path, change, message):
    state = small_state()
    change(state)
    write_state_dict(tmp_path / "x.pt", state)
    cfg = config.load(tiny.CONFIG, [f"{key}={value}" for key, value in tiny.SETTINGS.items()])
    with pytest.raises(ConversionError, match=message) as caught:
        models.from_checkpoints(cfg, {"S_P": tmp_path / "x.pt"})
    assert "x.pt" in str(caught.value) and "S_P" in str(caught.value) + "S_P" * (
        "holds" in message or "same" in message
    )


def test_another_network_is_refused_by_its_keys(golden_dir, tmp_path, full_config):
    write_state_dict(tmp_path / "x.pt", golden(golden_dir, "T_G"))
    with pytest.raises(ConversionError, match="not a checkpoint of mkd S_P: _fc1.0.weight is missing"):
        models.from_checkpoints(full_config(), {"S_P": tmp_path / "x.pt"})
    write_state_dict(tmp_path / "y.pt", golden(golden_dir, "T_M"))
    with pytest.raises(
        ConversionError, match="T_M with these settings; missing keys: mm.0.weight.*unknown keys: mm.linear"
    ):
        models.from_checkpoints(full_config("fusion.type=concat"), {"T_M": tmp_path / "y.pt"})


def test_usage_errors_are_one_line(tmp_path, capsys):
    write_state_dict(tmp_path / "x.pt", small_state())
    out = ["--out", str(tmp_path / "m")]
    settings = ["--config", tiny.CONFIG, *(f"--config.{key}={value}" for key, value in tiny.SETTINGS.items())]
    for arguments, message in (
        ([str(tmp_path / "x.pt"), *settings, *out], "S_P=FILE or T_M=FILE or T_G=FILE"),
        ([f"S_X={tmp_path / 'x.pt'}", *settings, *out], "'S_X' is unknown"),
        ([f"S_P={tmp_path / 'x.pt'}", *out], "--config FILE.py"),
        ([f"S_P={tmp_path / 'x.pt'}", *settings, *out, "--classes", "a,b,c"], "3 class names"),
        ([f"S_P={tmp_path / 'none.pt'}", *settings, *out], "none.pt"),
        ([str(tmp_path), "--to-torch", *out], "model.json"),
        (["a", "b", "--to-torch", *out], "one model folder"),
    ):
        assert main(["convert", *arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1, error
    assert main(["convert", f"S_P={tmp_path / 'x.pt'}", *settings, *out]) == 0
    assert main(["convert", f"S_P={tmp_path / 'x.pt'}", *settings, *out]) == 1, "a model is not replaced"
    assert main(["convert", *out[1:], "--to-torch", "--network", "T_Q", "--out", "x"]) == 1


def test_data_parallel_segments_do_not_matter_on_either_side():
    one = np.ones(1, np.float32)
    state = {"net.module.0.weight": one, "head.weight": 2 * one, "module_list.a": 3 * one, "loss.labels": one}
    expected = {"net.0.weight": (1,), "module.head.weight": (1,), "module_list.a": (1,)}
    matched = match(state, expected, ("loss.",), where="f", network="n")
    assert {key: value[0] for key, value in matched.tensors.items()} == {
        **{"net.0.weight": 1, "module.head.weight": 2, "module_list.a": 3}
    }
    assert matched.dead == ("loss.labels",)


def test_methods_without_published_checkpoints_say_so():
    cfg = config.load("configs/mkd.py:er")
    cfg.method = "nothing"
    with pytest.raises(ConversionError, match="'nothing' has no published checkpoints.*mkd"):
        adapters(cfg)
