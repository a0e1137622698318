"""Checkpoints of CoCoFNet and its student through `histokd convert` (check S4), against an independent network."""

import jax
import numpy as np
import paired_reference as ref
import paired_setup as setup
import pytest

from data_pipelines.torch_file import read_state_dict, write_state_dict
from histokd_jax.cli.main import main
from histokd_jax.convert import models
from histokd_jax.convert.matching import ConversionError
from histokd_jax.methods.hmkd import images, torch_keys
from histokd_jax.methods.hmkd.method import HE, HE_IHC
from histokd_jax.nn.paired.spec import PairedSpec
from histokd_jax.train import model_dir
from histokd_jax.utils import config

NETWORKS = ("teacher", "student")
TINY = [
    "model.widths=32,40,48,64",
    "model.stem_patch=2",
    "model.teacher_depths=1,0,0,0",
    "model.student_depths=1,0,0,0",
    "model.mlp_ratio=2",
    "model.refine_min=4",
    "model.head_hidden=8",
]


def load(*extra):
    return config.load("configs/hmkd.py", [*TINY, *extra])


def with_counters(state, network, spec=setup.TINY):
    """A state dict as PyTorch writes it: a step counter behind every running variance."""
    return {**state, **{key: np.asarray(7, np.int64) for key in torch_keys.counters(spec, network)}}


def float32(state):
    return {key: value.astype(np.float32) for key, value in state.items()}


@pytest.mark.parametrize("network,entries,tensors", [("teacher", 2050, 1342), ("student", 797, 521)])
def test_S4_importable_keys_and_shapes_are_those_of_the_companion_table(golden_dir, network, entries, tensors):
    spec, table = PairedSpec(), list(setup.key_table(golden_dir, network))
    names = torch_keys.names(spec, network)
    assert len(table) == entries == len(names) + len(torch_keys.counters(spec, network))
    assert {key for key, _, index, _ in table if index is not None} == set(names)
    assert {key for key, _, index, _ in table if index is None} == set(torch_keys.counters(spec, network))
    assert sum(t.collection == torch_keys.PARAMS for t in names.values()) == tensors
    kinds = {key: kind for key, _, index, kind in table if index is not None}
    assert all((t.collection == torch_keys.PARAMS) == (kinds[key] == "param") for key, t in names.items())
    state = {key: np.broadcast_to(np.float32(0), shape) for key, shape, index, _ in table if index is not None}
    params, stats = torch_keys.from_torch(state, spec, network)
    side = (jax.ShapeDtypeStruct((1, 256, 256, 3), np.float32),) * (2 if network == "teacher" else 1)
    like = jax.eval_shape(setup.NETWORKS[network](spec).init, jax.random.key(0), *side)
    assert jax.tree.map(np.shape, {"params": params, "batch_stats": stats}) == jax.tree.map(np.shape, dict(like))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(model folder of both networks, their state dicts)."""
    folder = tmp_path_factory.mktemp("convert")
    states = {name: float32(setup.tiny_state(name, seed=i)) for i, name in enumerate(NETWORKS)}
    for name, state in states.items():
        write_state_dict(folder / f"{name}.pth.tar", with_counters(state, name))
    files = [f"{name}={folder / name}.pth.tar" for name in NETWORKS]
    settings = [f"--config.{change}" for change in TINY]
    assert main(["convert", *files, "--config", "configs/hmkd.py", *settings, "--out", str(folder / "model")]) == 0
    return folder / "model", states


@pytest.mark.parametrize("mode,network", [(HE_IHC, "teacher"), (HE, "student")])
def test_converted_networks_answer_as_the_independent_implementation(converted, mode, network):
    folder, states = converted
    model = model_dir.load(folder, mode)
    rng = np.random.default_rng(0)
    pair = [rng.integers(0, 256, (2, 18, 20, 3), np.uint8) for _ in range(2 if network == "teacher" else 1)]
    batch = dict(zip(("image", "partner"), pair)) | {"weight": np.ones(2, np.float32)}
    found = setup.once(lambda p, e, b: model.method.predict(p, {}, e, b, mode), model.params, model.extra, batch)
    mean, std = (np.reshape(v, (1, 3, 1, 1)) for v in (images.MEAN, images.STD))
    tiles = [(np.moveaxis(x, -1, 1) / 255.0 - mean) / std for x in pair]
    expected = {"teacher": ref.teacher, "student": ref.student}[network](ref.Tensors(states[network]), *tiles)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-4)
    np.testing.assert_allclose(found["embedding"], expected["f3"], atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_back_to_the_authors_names_bit_for_bit(converted, network, tmp_path):
    folder, states = converted
    out = tmp_path / "back.pt"
    assert main(["convert", str(folder), "--to-torch", "--network", network, "--out", str(out)]) == 0
    back = read_state_dict(out)
    assert {key for key in back if key in states[network]} == set(states[network])
    for key, value in states[network].items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    assert set(back) - set(states[network]) == set(torch_keys.counters(setup.TINY, network))


def damaged(state, what):
    state = dict(state)
    if what == "missing":
        del state["fc_new2.bias"]
    elif what == "unknown":
        state["fc_new3.bias"] = np.zeros(4, np.float32)
    elif what == "statistic":
        del state["fc_new1.1.running_var"]
    else:
        state["patch_embed_A0.proj.weight"] = np.zeros((32, 3, 4, 4), np.float32)
    return state


@pytest.mark.parametrize(
    "what,message",
    [
        ("missing", "missing keys: fc_new2.bias"),
        ("unknown", "unknown keys: fc_new3.bias"),
        ("statistic", "missing keys: fc_new1.1.running_var"),
        ("shape", r"patch_embed_A0.proj.weight has shape \(32, 3, 4, 4\), expected \(32, 3, 2, 2\)"),
    ],
)
def test_every_deviation_is_named(converted, what, message, tmp_path):
    write_state_dict(tmp_path / "x.pt", damaged(converted[1]["student"], what))
    with pytest.raises(ConversionError, match=message):
        models.from_checkpoints(load(), {"student": tmp_path / "x.pt"})


def test_a_student_is_no_teacher(converted, tmp_path):
    write_state_dict(tmp_path / "x.pt", converted[1]["student"])
    with pytest.raises(ConversionError, match="not a checkpoint of HM-KD teacher"):
        models.from_checkpoints(load(), {"teacher": tmp_path / "x.pt"})


@pytest.mark.torch
def test_a_checkpoint_as_the_release_writes_it_is_read(converted, tmp_path):
    """A state dict within a dictionary that also holds an epoch and NumPy scores (D27)."""
    torch = pytest.importorskip("torch")
    state = converted[1]["student"]
    saved = {"epoch": 3, "state_dict": {k: torch.tensor(v) for k, v in with_counters(state, "student").items()}}
    torch.save({**saved, "best_f1": np.float64(0.5), "best_acc": 0.25}, tmp_path / "best_KD_f1.pth.tar")
    found = models.from_checkpoints(load(), {"student": tmp_path / "best_KD_f1.pth.tar"})
    assert found.spec.num_classes == 4 and len(found.matched["student"].tensors) == len(state)
    expected = torch_keys.from_torch(state, setup.TINY, "student")
    jax.tree.map(np.testing.assert_array_equal, (found.params["student"], found.extra["student"]), expected)
