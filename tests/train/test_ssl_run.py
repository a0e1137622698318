"""Pre-training end to end on tiny pairs: run directory, resume, encoder folders, unlabelled data, bad input."""

import csv
import json

import jax
import numpy as np
import pair_files
import pytest
import ssl_setup as setup

from data_pipelines.errors import DataError
from data_pipelines.pairs.labels import LabelRule
from data_pipelines.pairs.manifest import PairManifest
from data_pipelines.pairs.reader import PairReader
from data_pipelines.pairs.simulate import PairSpec, simulate_pairs
from data_pipelines.pairs.steps import IMAGE, PairSource, plan_training
from data_pipelines.pipeline import SlideTable, StepIterator
from histokd_jax import inference
from histokd_jax.cli.main import main
from histokd_jax.embed.embedder import Compute, Embedder
from histokd_jax.encoders import folder
from histokd_jax.encoders.loading import load_folder
from histokd_jax.evals.representation_predictions import read_rows
from histokd_jax.methods.registry import get_method
from histokd_jax.train import model_dir, pair_experiment, run, sharding, signals
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.train.signals import Interrupted
from histokd_jax.utils import config

SETTINGS = {
    "encoder.blocks": "(1,)",
    "projector.widths": "12,12",
    "privileged_encoder.widths": "8,16",
    "augment.preset": "hmkd_faithful",
    "train.b": "8",
    "train.max_epochs": "2",
    "train.warmup_fraction": "0.25",
    "ckpt.every_epochs": "1",
    "report.bootstrap": "50",
    "split.val_fraction": "0.34",
}
NO_LABELS = LabelRule("none")


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory):
    """24 + 12 simulated pairs; read only."""
    path = tmp_path_factory.mktemp("pairs") / "sim"
    simulate_pairs(path, PairSpec(n_train=24, n_test=12, size=16, per_group=1, noise=2.0))
    return path


def settings(data, **changes):
    values = {**SETTINGS, "data.dir": str(data), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


def tiny(data, words="trident,smoke", **changes):
    return config.load(f"configs/ssl.py:{words}", settings(data, **changes))


@pytest.fixture(scope="module")
def trained(pairs_dir, tmp_path_factory):
    """A finished run with report; read only."""
    path = tmp_path_factory.mktemp("trained") / "run"
    arguments = [f"--config.{text}" for text in settings(pairs_dir, export__privileged=True)]
    assert main(["train", "--config", "configs/ssl.py:trident,smoke", "--workdir", str(path), *arguments]) == 0
    return path


def records(workdir, split="train"):
    lines = [json.loads(line) for line in (workdir / "fold_0/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


class StopAfter(signals.StopRequest):
    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


def test_the_run_directory_of_a_label_free_run(trained, pairs_dir):
    fold = {p.name for p in (trained / "fold_0").iterdir()}
    assert fold >= {"encoder", "encoder_privileged", "model", "metrics.jsonl", "fold.json", "predictions_test.csv"}
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["task_kind"] == "representation" and summary["modes"]["views"]["n_rows"] == 12
    rows = read_rows(trained / "predictions_test.csv")
    assert sorted(rows.slide_id) == sorted(
        e.example_id for e in PairManifest.load(pairs_dir).examples if e.split == "test"
    )
    assert sorted(set(rows.together.tolist())) == [4, 8]
    full = rows.full_steps()
    assert summary["modes"]["views"]["metrics"]["loss"]["mean"] == pytest.approx(full.loss.mean())
    assert summary["modes"]["views"]["n_left_out"] == 4
    text = (trained / "report.html").read_text()
    assert "Joint-embedding loss" in text and "Effective rank" in text and "simulated images" in text


def test_metrics_of_every_epoch_show_terms_health_and_the_rate_of_the_step(trained):
    train, val = records(trained), records(trained, "val")
    # Four steps, one of them warm-up: the rate of the last step of each epoch.
    assert [line["lr"] for line in train] == pytest.approx([1e-4, 0.25e-4])
    for line in train:
        assert {"invariance", "variance", "covariance", "spread_image", "spread_partner", "partners"} <= set(line)
        assert {f"{name}_{k}" for name in ("std_unit", "effective_rank", "dead_dims") for k in range(3)} <= set(line)
        assert line["partners"] == 1.0 and line["spread_partner"] > 0
    assert val[0]["monitor"] == -val[0]["loss_views"]
    assert json.loads((trained / "fold_0/fold.json").read_text())["traces"] == 1


@pytest.mark.parametrize("name", ["encoder", "encoder_privileged"])
def test_the_encoder_folder_gives_embed_the_features_of_the_model(trained, pairs_dir, name):
    """F3-8: `histokd embed --weights FOLDER` reads it, and nothing else of the run is in it."""
    loaded = load_folder(trained / "fold_0" / name)
    assert set(loaded.variables) == {"params", "batch_stats"}
    assert set(loaded.variables["params"]) == {"stem", "stage0_block0"}
    model = model_dir.load(trained / "fold_0/model", "views")
    group = "encoder_0" if name == "encoder" else "encoder_1"
    for a, b in zip(jax.tree.leaves(loaded.variables["params"]), jax.tree.leaves(model.params[group]), strict=True):
        np.testing.assert_array_equal(a, b)
    batch = setup.batch(4)
    cfg = config.load("configs/ssl.py:trident,smoke", settings(pairs_dir, augment__validation="plain"))
    plain = get_method("ssl")(cfg, model.spec)
    if name == "encoder_privileged":
        batch["image"] = batch["partner"]
        swapped = {"encoder_0": model.params["encoder_1"]}, {"encoder_0": model.extra["encoder_1"]}
        params, extra = {**model.params, **swapped[0]}, {**model.extra, **swapped[1]}
    else:
        params, extra = model.params, model.extra
    expected = plain.predict(params, {}, extra, batch, "views")["embedding"]
    found = Embedder(loaded, Compute(batch=4, devices=1))(batch["image"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    facts = json.loads((trained / "fold_0" / name / folder.ENCODER_FILE).read_text())
    assert facts["facts"]["simulated"] is True and facts["facts"]["method"] == "ssl"
    assert loaded.encoder.transform.scale == 1.0 and loaded.encoder.transform.size == 16


def test_F3_10_stopping_and_continuing_gives_the_same_bits(trained, pairs_dir, tmp_path, monkeypatch):
    cfg = tiny(pairs_dir, export__privileged=True)
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", lambda: StopAfter(2))
        with pytest.raises(Interrupted, match="run the same command again"):
            run.train(cfg, tmp_path / "run")
    run.train(cfg, tmp_path / "run")
    name = "predictions_test.csv"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()
    first, second = (folder.load(w / "fold_0/encoder")[1] for w in (trained, tmp_path / "run"))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    losses = [[line["loss"] for line in records(w)] for w in (trained, tmp_path / "run")]
    assert losses[0] == losses[1]


def test_unlabelled_pairs_with_absent_partners_train_from_folds_by_group(tmp_path):
    pair_files.bci(tmp_path / "s", train=20, test=8)
    for number in (2, 5, 8, 11, 14):
        (tmp_path / f"s/train/IHC/{number:05d}_train_{pair_files.GRADES[number % 4]}.png").unlink()
    manifest = pair_files.imported(
        tmp_path / "s", tmp_path / "data", rule=NO_LABELS, missing_partner="keep", group_regex=r"(\d_t[re])"
    ).manifest
    assert not manifest.class_names and sum(not e.has_partner for e in manifest.examples) == 5
    cfg = tiny(tmp_path / "data", data__official_split=False, split__n_folds=4, train__max_epochs=1, train__b=4)
    run.train(cfg, tmp_path / "run")
    line = records(tmp_path / "run")[0]
    assert 0.4 < line["partners"] < 1.0
    experiment = pair_experiment.load_experiment(sharding.resolve_mesh(cfg))
    for split in experiment.folds:
        parts = [{experiment.cohort.case_id[r] for r in getattr(split, p)} for p in ("train", "val", "test")]
        assert not parts[0] & parts[2] and not parts[1] & parts[2] and not parts[0] & parts[1]


def test_bad_input_a_constant_view_is_reported_once_with_the_evidence(tmp_path, caplog):
    pair_files.bci(tmp_path / "s", train=12, test=4)
    for path in (tmp_path / "s").rglob("IHC/*.png"):
        pair_files.write(path, np.full((16, 16, 3), 200, np.uint8))
    pair_files.imported(tmp_path / "s", tmp_path / "data", rule=NO_LABELS)
    cfg = tiny(tmp_path / "data", split__val_fraction=0.0, train__b=4)
    with caplog.at_level("WARNING", "absl"):
        run.train(cfg, tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "THE VIEW 'partner' IS CONSTANT" in record.getMessage()]
    assert len(said) == 1 and "epoch 0" in said[0]
    found = json.loads((tmp_path / "run/fold_0/findings.json").read_text())
    assert "constant_partner" in found and "constant_image" not in found


def test_a_vector_as_privileged_view_and_bad_input_a_vector_of_another_length(tmp_path):
    data = {}
    for size in (6, 5):
        source = tmp_path / f"s{size}"
        names = list(pair_files.bci(source, train=8, test=4))
        with (tmp_path / f"v{size}.csv").open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["example_id", *(f"g{i}" for i in range(size))])
            rows.writerows([name, *np.random.default_rng(i).poisson(3, size)] for i, name in enumerate(names))
        options = {"rule": NO_LABELS, "vectors": str(tmp_path / f"v{size}.csv")}
        data[size] = tmp_path / f"d{size}"
        pair_files.imported(source, data[size], **options)
    cfg = tiny(data[6], data__partner="vector", train__max_epochs=1, train__b=4)
    run.train(cfg, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run/fold_0").iterdir()} >= {"encoder", "model"}
    table = inference.predict([tmp_path / "run/fold_0/model"], data[6], "views")
    assert len(table) == 12 and np.isfinite(table.loss).all()
    with pytest.raises(ValueError, match="vectors of 5 numbers, the model was trained on 6"):
        inference.predict([tmp_path / "run/fold_0/model"], data[5], "views")


def test_training_starts_from_an_encoder_folder(trained, pairs_dir, tmp_path):
    start = trained / "fold_0/encoder"
    cfg = tiny(pairs_dir, encoder__init=start, train__max_epochs=1, train__lr=1e-12)
    run.train(cfg, tmp_path / "run")
    a, b = (folder.load(path)[1] for path in (start, tmp_path / "run/fold_0/encoder"))
    for x, y in zip(jax.tree.leaves(a["params"]), jax.tree.leaves(b["params"]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    with pytest.raises(ValueError, match="another architecture: width = 4 there, 8 here"):
        run.train(tiny(pairs_dir, encoder__init=start, encoder__width=8), tmp_path / "wide")
    with pytest.raises(ValueError, match="set encoder.input"):
        run.train(tiny(pairs_dir, encoder__init=start, encoder__input="standardised"), tmp_path / "scale")
    with pytest.raises(DataError, match="no encoder folder"):
        run.train(tiny(pairs_dir, encoder__init=tmp_path), tmp_path / "none")
    with pytest.raises(CheckpointMismatchError, match="another configuration"):
        run.train(tiny(pairs_dir), tmp_path / "run")


def test_bad_requests_name_the_setting(pairs_dir, tmp_path):
    def refused(match, words="trident,smoke", **changes):
        with pytest.raises(ValueError, match=match):
            run.train(tiny(pairs_dir, words, **changes), tmp_path / "never")

    refused(r"train\.b = 1 is not possible; expected at least 2", train__b=1)
    refused(r"early_stop\.monitor='accuracy'", early_stop__monitor="accuracy")
    refused(r"method ssl knows representation", task_kind="classification", early_stop__monitor="accuracy")
    refused(r"train\.nonfinite='hope'", train__nonfinite="hope")
    refused(r"train\.warmup_fraction=1\.5", train__warmup_fraction=1.5)
    refused(r"train\.warmup_start <= train\.lr", train__warmup_start=1.0)
    refused(r"8 images cannot be divided over mesh\.data=3", mesh__data=3)
    refused(r"has no partner images|no partners", data__partner="none")
    assert not (tmp_path / "never/fold_0").exists()


def test_bad_input_records_without_any_partner_are_refused(tmp_path):
    pair_files.bci(tmp_path / "s", train=12, test=4)
    for number in range(12):
        (tmp_path / f"s/train/IHC/{number:05d}_train_{pair_files.GRADES[number % 4]}.png").unlink()
    pair_files.imported(tmp_path / "s", tmp_path / "data", rule=NO_LABELS, missing_partner="keep")
    with pytest.raises(ValueError, match="none of the 12 training examples has a partner image"):
        run.train(tiny(tmp_path / "data", split__val_fraction=0.0, train__b=4), tmp_path / "run")


@pytest.mark.parametrize("threads", [1, 4])
def test_F3_7_both_views_of_a_row_carry_the_same_record(tmp_path, threads):
    for number in range(10):
        for stain in ("HE", "IHC"):
            value = np.full((8, 8, 3), 20 * number + 5, np.uint8)
            pair_files.write(tmp_path / f"s/train/{stain}/{number:05d}_train_0.png", value)
    reader = PairReader(pair_files.imported(tmp_path / "s", tmp_path / "data", rule=NO_LABELS).manifest)
    plan = plan_training(10, None, batch=5, epochs=3, seed=1)
    source = PairSource(reader, SlideTable(np.arange(10, dtype=np.int32), {}), plan, IMAGE)
    seen = []
    for batch in StepIterator(source, start_step=0, num_threads=threads):
        ids = batch["image"][:, 0, 0, 0]
        np.testing.assert_array_equal(ids, batch["partner"][:, 4, 4, 2])
        np.testing.assert_array_equal(ids, 20 * batch["example"] + 5)
        seen.append(ids.tolist())
        if len(seen) == plan.epochs * plan.steps_per_epoch:
            break
    assert sorted(sum(seen[:2], [])) == [20 * i + 5 for i in range(10)] and seen[0] != seen[2]
