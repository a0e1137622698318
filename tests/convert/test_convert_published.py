"""Published checkpoints and golden fills through the converter: logits, counts of used tensors, round trips."""

import convert_setup
import golden_fill as gf
import jax
import numpy as np
import pytest

from data_pipelines.torch_file import read_state_dict, write_state_dict
from data_pipelines.writer import DatasetWriter
from histokd_jax import inference
from histokd_jax.convert import models
from histokd_jax.convert.matching import ConversionError, plain
from histokd_jax.train import model_dir

# model.name -> golden key table.
SUPERVISED = {"abmil": "abmil", "deepsets": "deepsets", "snn": "snn", "deepattnmisl": "deepattnmisl"}
SUPERVISED |= {name: name for name in ("clam_sb", "clam_mb", "dsmil", "transmil", "mcat", "porpoise_mmf", "survpath")}
EDGES = (0.0, 10.0, 24.0, 50.0, 120.0)
CHECKPOINTS = {"clam_sb": "clam/s_0_checkpoint.pt", "dsmil": "dsmil/tcga_aggregator.pth"}


def patches(n, width, seed=0):
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)


def affine(state, key, x):
    return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]


def softmax(x):
    e = np.exp(x - x.max(axis=0))
    return e / e.sum(axis=0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def clam_logits(state, x):
    """Specification survival_baselines, section 7, single branch, in float64."""
    h = np.maximum(affine(state, "attention_net.0", x), 0)
    gate = np.tanh(affine(state, "attention_net.3.attention_a.0", h))
    gate = gate * sigmoid(affine(state, "attention_net.3.attention_b.0", h))
    weight = softmax(affine(state, "attention_net.3.attention_c", gate)[:, 0])
    return affine(state, "classifiers", weight @ h)


def dsmil_logits(state, x):
    """Specification survival_baselines, section 8b, default options, in float64."""
    scores = affine(state, "i_classifier.fc.0", x)

    def query(v):
        return np.tanh(affine(state, "b_classifier.q.2", np.maximum(affine(state, "b_classifier.q.0", v), 0)))

    weight = softmax(query(x) @ query(x[scores.argmax(axis=0)]).T / np.sqrt(128))
    rows = weight.T @ x
    return np.einsum("oik,ik->o", state["b_classifier.fcc.weight"], rows) + state["b_classifier.fcc.bias"]


LOGITS = {"clam_sb": clam_logits, "dsmil": dsmil_logits}


def supervised(name, **changes):
    return convert_setup.full_config("supervised", **{"model__name": name, "task_kind": "classification", **changes})


def convert(tmp_path, name, file):
    cfg = supervised(name)
    converted = models.from_checkpoints(cfg, {"": file})
    models.write_model(tmp_path / "model", cfg, converted, class_names=["normal", "tumour"])
    return converted


def apply(folder, x, dtype=np.float32):
    """Logits of one bag by the model of a folder."""
    model = model_dir.load(folder, "pathology")
    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), model.params)
    ids = np.ones((1, len(x)), np.int32)
    batch = {"patches": x[None].astype(dtype), "segment_ids": ids}
    batch |= {"positions": np.arange(len(x), dtype=np.int32)[None], "weight": np.ones(1, np.float32)}
    return np.asarray(model.method.predict(params, {}, {}, batch, "pathology")["logits"])[0]


@pytest.mark.real_data
@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("n", [1, 37])
def test_published_checkpoints_give_the_logits_of_their_weights(real_data, tmp_path, name, n):
    file = real_data / "reference_checkpoints" / CHECKPOINTS[name]
    converted = convert(tmp_path, name, file)
    stored = {plain(key): value for key, value in read_state_dict(file).items()}
    exact = {key: value.astype(np.float64) for key, value in stored.items()}
    dead = ("instance_loss_fn.labels",) if name == "clam_sb" else ()
    assert converted.matched[name].dead == dead and len(converted.matched[name].tensors) == len(stored) - len(dead)
    assert (converted.spec.feat_dim, converted.spec.num_classes) == ({"clam_sb": 1024, "dsmil": 512}[name], 2)
    x = patches(n, converted.spec.feat_dim)
    expected = LOGITS[name](exact, x.astype(np.float64))
    with jax.enable_x64(True):
        np.testing.assert_allclose(apply(tmp_path / "model", x, np.float64), expected, rtol=1e-10, atol=1e-10)
    # The trained attention of CLAM magnifies rounding: NumPy in float32 is off by several 1e-6 itself.
    own = np.abs(LOGITS[name](stored, x) - expected).max()
    np.testing.assert_allclose(apply(tmp_path / "model", x), expected, rtol=0, atol=max(1e-5, 10 * own))
    # Features of the size that encoders give (not negative, mean 0.4) are within 1e-5.
    x = 0.5 * np.abs(x)
    expected = LOGITS[name](exact, x.astype(np.float64))
    np.testing.assert_allclose(apply(tmp_path / "model", x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.real_data
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_published_checkpoints_come_back_bit_for_bit(real_data, tmp_path, name):
    file = real_data / "reference_checkpoints" / CHECKPOINTS[name]
    convert(tmp_path, name, file)
    write_state_dict(tmp_path / "back.pt", models.to_checkpoint(tmp_path / "model"))
    back = read_state_dict(tmp_path / "back.pt")
    stored = {plain(k): v for k, v in read_state_dict(file).items() if not k.startswith("instance_loss_fn")}
    assert set(back) == set(stored)
    for key, value in stored.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == value.tobytes(), key


@pytest.mark.real_data
def test_a_published_checkpoint_predicts_a_data_set(real_data, tmp_path):
    converted = convert(tmp_path, "dsmil", real_data / "reference_checkpoints" / CHECKPOINTS["dsmil"])
    bags = {f"s{k}": patches(5 + 7 * k, converted.spec.feat_dim, k) for k in range(3)}
    with DatasetWriter(tmp_path / "data", name="t", feat_dim=converted.spec.feat_dim, dtype="float32") as out:
        for slide, x in bags.items():
            out.add(slide, slide, x)
    table = inference.predict([tmp_path / "model"], tmp_path / "data", "pathology")
    for slide, probs in zip(table.slide_id, table.probs):
        logits = apply(tmp_path / "model", bags[slide])
        expected = np.exp(logits - logits.max())
        np.testing.assert_allclose(probs, expected / expected.sum(), atol=1e-5)


@pytest.mark.real_data
def test_one_published_network_is_not_the_other(real_data, tmp_path):
    cfg = supervised("clam_sb")
    with pytest.raises(ConversionError, match="not a checkpoint of clam_sb: attention_net.0.weight is missing"):
        models.from_checkpoints(cfg, {"": real_data / "reference_checkpoints" / CHECKPOINTS["dsmil"]})
    cfg = supervised("dsmil", model__dsmil__linear_query=True)
    with pytest.raises(ConversionError, match="missing keys: b_classifier.q.weight.*unknown keys: b_classifier.q.0"):
        models.from_checkpoints(cfg, {"": real_data / "reference_checkpoints" / CHECKPOINTS["dsmil"]})
    cfg = supervised("dsmil", model__dsmil__query=64)
    with pytest.raises(ConversionError, match=r"b_classifier.q.0.weight has shape \(128, 512\), expected \(64, 512\)"):
        models.from_checkpoints(cfg, {"": real_data / "reference_checkpoints" / CHECKPOINTS["dsmil"]})


@pytest.mark.parametrize("name", SUPERVISED)
def test_golden_fills_convert_and_come_back(golden_dir, tmp_path, name):
    state = {k: v.astype(np.float32) for k, v in gf.state_dict(golden_dir, SUPERVISED[name]).items()}
    write_state_dict(tmp_path / "x.pt", state)
    cfg = supervised(name, task_kind="survival") if name != "dsmil" else supervised(name)
    converted = models.from_checkpoints(cfg, {name: tmp_path / "x.pt"})
    spec = converted.spec
    assert spec.num_classes == (2 if name == "dsmil" else 4) and converted.matched[name].dead == ()
    genes = {key: value.shape[1] for key, value in state.items() if ".0.0.weight" in key and "sig" in key}
    genes |= {"fc": state["fc_omic.0.0.weight"].shape[1]} if "fc_omic.0.0.weight" in state else {}
    assert spec.num_genes == sum(genes.values()) and spec.gene_groups == (
        tuple(genes.values()) if "sig" in str(genes) else ()
    )
    models.write_model(tmp_path / "model", cfg, converted, edges=EDGES)
    back = models.to_checkpoint(tmp_path / "model")
    assert set(back) == set(state)
    for key, value in state.items():
        assert np.ascontiguousarray(back[key]).tobytes() == value.tobytes(), key


def test_grouped_networks_need_their_groups(golden_dir, tmp_path):
    write_state_dict(tmp_path / "x.pt", {"classifier.weight": np.ones((4, 256), "f4")})
    with pytest.raises(ConversionError, match="not a checkpoint of mcat: no key like sig_networks"):
        models.from_checkpoints(supervised("mcat", task_kind="survival"), {"": tmp_path / "x.pt"})


GROUPS = (12, 9, 3, 7, 5, 10)


def ghanet_state(golden_dir):
    """104 tensors of the default architecture with small gene groups, closed-form values."""
    lines = (golden_dir / "g_hanet_fill.tsv").read_text().splitlines()
    header = lines[0].split("\t")
    rows = [dict(zip(header, line.split("\t"))) for line in lines[1:]]
    state = {}
    for row in rows:
        key = row["key"].split(":", 1)[1]
        shape = tuple(int(n) for n in row["shape"].split(","))
        parts = key.split(".")
        if "sig_reconstruct_net" in key and parts[3] == "4":
            shape = (GROUPS[int(parts[2])], *shape[1:])
        state[key] = gf.fill(row["key"], shape).astype(np.float32)
    return state


def test_C10_99_of_104_tensors_of_ghanet_are_used(golden_dir, tmp_path):
    state = ghanet_state(golden_dir)
    assert len(state) == 104
    write_state_dict(tmp_path / "x.pt", {f"module.{key}": value for key, value in state.items()})
    cfg = convert_setup.full_config("ghanet", task_kind="survival", cab__second_attention="shared")
    converted = models.from_checkpoints(cfg, {"": tmp_path / "x.pt"})
    matched = converted.matched["ghanet"]
    assert len(matched.tensors) == 99
    second = "recon_net.cross_attention1."
    assert set(matched.dead) == {f"{second}{k}.weight" for k in ("to_q.0", "to_k.0", "to_v", "to_out")} | {
        f"{second}to_out.bias"
    }
    assert matched.summary().startswith("99 of 104 tensors used; stored but never used")
    assert converted.spec.gene_groups == GROUPS and converted.spec.num_genes == sum(GROUPS)
    assert (converted.spec.feat_dim, converted.spec.num_classes, converted.spec.task) == (1024, 4, "survival")
    with pytest.raises(ConversionError, match="0 edges of time bins, but 4 bins have 5"):
        models.write_model(tmp_path / "model", cfg, converted)
    models.write_model(tmp_path / "model", cfg, converted, edges=EDGES)
    back = models.to_checkpoint(tmp_path / "model")
    assert set(back) == {key for key in state if not key.startswith(second)}
    for key, value in back.items():
        assert np.ascontiguousarray(value).tobytes() == state[key].tobytes(), key
    loaded = model_dir.load(tmp_path / "model", "pathology")
    assert set(loaded.params) == {"CAB", "HSB"}, "the heads are not needed for prediction"
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
    bag = patches(23, 1024)
    with DatasetWriter(tmp_path / "data", name="t", feat_dim=1024, dtype="float32") as out:
        out.add("s", "p", bag)
    table = inference.predict([tmp_path / "model"], tmp_path / "data", "pathology")
    assert len(table) == 1 and -4 < float(table.risk[0]) < 0, "the risk is minus the sum of four survival values"


def test_ghanet_deviations_name_the_key(golden_dir, tmp_path):
    cfg = convert_setup.full_config("ghanet", task_kind="survival", cab__second_attention="shared")
    for change, message in (
        (lambda s: s.pop("butter.1.bias"), "missing keys: butter.1.bias"),
        (lambda s: s.update({"new.weight": np.ones(2, "f4")}), "unknown keys: new.weight"),
        (
            lambda s: s.update({"classifier.weight": np.ones((4, 9), "f4")}),
            r"classifier.weight has shape \(4, 9\), exp",
        ),
    ):
        state = ghanet_state(golden_dir)
        change(state)
        write_state_dict(tmp_path / "x.pt", state)
        with pytest.raises(ConversionError, match=message):
            models.from_checkpoints(cfg, {"": tmp_path / "x.pt"})
    with pytest.raises(ConversionError, match="second_attention=shared"):
        models.from_checkpoints(convert_setup.full_config("ghanet", task_kind="survival"), {"": tmp_path / "x.pt"})
