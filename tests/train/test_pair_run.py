"""Whole runs on image pairs: the same loop, run directory, resume, prediction and report as for bags."""

import json

import jax
import numpy as np
import pair_files
import pytest

from data_pipelines.pairs.cohort import pair_cohort
from data_pipelines.pairs.manifest import PairManifest
from data_pipelines.pairs.simulate import PairSpec, simulate_pairs
from histokd_jax import inference
from histokd_jax.cli.main import main
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.train import data_kinds, model_dir, pair_experiment, run, sharding, signals, sweep
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.train.loop import DivergedError
from histokd_jax.train.signals import Interrupted
from histokd_jax.utils import config

CONFIG = "configs/image_classifier.py:both"
SPEC = PairSpec(n_train=24, n_test=12, size=16, per_group=1, noise=2.0)
SETTINGS = {
    "model.widths": "8,8",
    "train.b": "8",
    "train.max_epochs": "3",
    "ckpt.every_epochs": "1",
    "report.bootstrap": "50",
    "split.val_fraction": "0.34",
}


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory):
    """24 + 12 simulated pairs; read only."""
    path = tmp_path_factory.mktemp("pairs") / "sim"
    simulate_pairs(path, SPEC)
    return path


def settings(data, **changes):
    values = {**SETTINGS, "data.dir": str(data), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


def tiny_config(data, spec=CONFIG, **changes):
    return config.load(spec, settings(data, **changes))


@pytest.fixture(scope="module")
def trained(pairs_dir, tmp_path_factory):
    """A finished run with report; read only."""
    path = tmp_path_factory.mktemp("trained") / "run"
    arguments = [f"--config.{text}" for text in settings(pairs_dir)]
    assert main(["train", "--config", CONFIG, "--workdir", str(path), *arguments]) == 0
    return path


class StopAfter(signals.StopRequest):
    """A request that arrives after a number of steps, without any signal."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


def tables(workdir):
    return {p.relative_to(workdir).as_posix(): p.read_bytes() for p in sorted(workdir.rglob("predictions_*.csv"))}


def test_the_run_directory_holds_what_that_of_bags_holds(trained, pairs_dir):
    names = {p.name for p in trained.iterdir()}
    assert names >= {"config.json", "run_manifest.json", "predictions_val.csv", "predictions_test.csv", "summary.json"}
    assert "report.html" in names
    fold = {p.name for p in (trained / "fold_0").iterdir()}
    assert fold >= {"metrics.jsonl", "checkpoints", "model", "fold.json", "predictions_val.csv"}
    facts = json.loads((trained / "run_manifest.json").read_text())
    assert (
        facts["simulated"] and facts["input"]["resident"] is False and facts["class_names"] == ["0", "1+", "2+", "3+"]
    )
    assert facts["data_fingerprint"] == PairManifest.load(pairs_dir).fingerprint()
    assert facts["packing"]["0"] == {"examples_per_step": 8, "epochs": 3, "steps_per_epoch": 2, "fill": 1.0}
    lines = [json.loads(line) for line in (trained / "fold_0/metrics.jsonl").read_text().splitlines()]
    assert all("images_per_second" in line for line in lines if line["split"] == "train")
    waits = [line["input_bound_fraction"] for line in lines if line["split"] == "train"]
    assert len(waits) == 3 and all(0.0 <= wait <= 1.0 for wait in waits)
    assert "Waiting for input" in (trained / "report.html").read_text()
    assert all("weighted_f1_both" in line for line in lines if line["split"] == "val")
    assert json.loads((trained / "fold_0/fold.json").read_text())["traces"] == 1


def test_predictions_are_keyed_by_example_and_group(trained, pairs_dir):
    manifest = PairManifest.load(pairs_dir)
    table = read_predictions(trained / "predictions_test.csv")
    expected = [e for e in manifest.examples if e.split == "test"]
    assert sorted(table.slide_id) == sorted(e.example_id for e in expected)
    by_id = {e.example_id: e for e in expected}
    for slide, case, label in zip(table.slide_id, table.case_id, table.label):
        assert (case, label) == (by_id[slide].group, by_id[slide].label)
    val = read_predictions(trained / "predictions_val.csv")
    assert len(val) == 8 and not set(val.slide_id) & set(table.slide_id)


def test_the_report_shows_confusion_and_every_class(trained):
    text = (trained / "report.html").read_text()
    assert "simulated images" in text and "simulated bags" not in text
    assert "Confusion matrices" in text and "Weighted F1" in text and "Quadratic-weighted kappa" in text
    assert '<th scope="row">3+</th>' in text


def test_stopping_and_continuing_gives_the_same_bits(pairs_dir, trained, tmp_path, monkeypatch):
    cfg = tiny_config(pairs_dir)
    for steps in (2, 5):
        with monkeypatch.context() as patch:
            patch.setattr(run, "StopRequest", lambda steps=steps: StopAfter(steps - 1))
            with pytest.raises(Interrupted, match="run the same command again"):
                run.train(cfg, tmp_path / str(steps))
        run.train(cfg, tmp_path / str(steps))
        assert tables(tmp_path / str(steps)) == tables(trained)
        first, second = (model_dir.load(w / "fold_0/model", "both") for w in (trained, tmp_path / str(steps)))
        for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(second.params), strict=True):
            np.testing.assert_array_equal(a, b)


def test_another_data_set_or_setting_does_not_continue_a_run(trained, tmp_path):
    simulate_pairs(tmp_path / "other", PairSpec(**{**SPEC.__dict__, "seed": 9}))
    with pytest.raises(CheckpointMismatchError, match=r"data\.dir|input"):
        run.train(tiny_config(tmp_path / "other"), trained)


@pytest.mark.parametrize("devices", [4])
def test_several_devices_give_the_same_training(pairs_dir, trained, tmp_path, devices):
    run.train(tiny_config(pairs_dir, mesh__data=devices), tmp_path / "run")
    first, second = (read_predictions(w / "predictions_test.csv") for w in (trained, tmp_path / "run"))
    assert first.slide_id.tolist() == second.slide_id.tolist()
    np.testing.assert_allclose(first.probs, second.probs, atol=2e-4)


def test_prediction_needs_the_fields_of_its_mode_only(pairs_dir, tmp_path):
    cfg = tiny_config(pairs_dir, "configs/image_classifier.py:image", train__max_epochs=1)
    run.train(cfg, tmp_path / "run")
    source = tmp_path / "images"
    images = {f"x{i}": pair_files.noise(i) for i in range(3)}
    for name, pixels in images.items():
        pair_files.write(source / f"{name}.png", pixels)
    pair_files.imported(source, tmp_path / "data")
    out = tmp_path / "p.csv"
    for data in (source, tmp_path / "data"):
        assert main(["predict", "--model", str(tmp_path / "run"), "--data", str(data), "--out", str(out)]) == 0
        table = read_predictions(out)
        assert table.slide_id.tolist() == ["x0", "x1", "x2"] and table.label.tolist() == [-1] * 3
        model = model_dir.load(tmp_path / "run/fold_0/model", "image")
        batch = {"image": np.stack(list(images.values()))}
        expected = model.method.predict(model.params, {}, model.extra, batch, "image")["prob"]
        np.testing.assert_allclose(table.probs, expected, atol=1e-5)


def test_evaluation_on_another_data_set_compares_its_own_labels(trained, tmp_path, capsys):
    simulate_pairs(tmp_path / "other", PairSpec(**{**SPEC.__dict__, "seed": 9}))
    code = main(
        ["evaluate", "--workdir", str(trained), "--data", str(tmp_path / "other"), "--out", str(tmp_path / "e")]
    )
    assert code == 0 and "Weighted F1" in capsys.readouterr().out
    assert json.loads((tmp_path / "e/summary.json").read_text())["modes"]["both"]["n_rows"] == 36


def test_the_published_protocol_selects_on_the_reported_part_and_says_so(pairs_dir, tmp_path):
    cfg = tiny_config(pairs_dir, split__protocol="published", early_stop__enabled=True, early_stop__patience=99)
    summary = run.train(cfg, tmp_path / "run")
    assert summary["marks"] == ["reported part = validation part (published protocol), epoch selected on it"]
    val, test = (read_predictions(tmp_path / f"run/predictions_{part}.csv") for part in ("val", "test"))
    assert sorted(val.slide_id) == sorted(test.slide_id)


def test_the_selected_epoch_is_exported_with_its_own_running_statistics(pairs_dir, tmp_path):
    """T5: parameters and statistics belong to the first best epoch, so the exported network scores as recorded."""
    changes = {"early_stop__enabled": True, "early_stop__patience": 99, "split__protocol": "published"}
    cfg = tiny_config(pairs_dir, model__norm="batch", train__max_epochs=4, train__lr=0.03, **changes)
    run.train(cfg, tmp_path / "run")
    assert (tmp_path / "run/fold_0/model/extra_network").is_dir()
    lines = [json.loads(line) for line in (tmp_path / "run/fold_0/metrics.jsonl").read_text().splitlines()]
    monitor = [line["monitor"] for line in lines if line["split"] == "val"]
    best = json.loads((tmp_path / "run/fold_0/fold.json").read_text())["progress"]["stopper"]["best_epoch"]
    assert best == monitor.index(max(monitor)), "the earlier of equals"
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["modes"]["both"]["metrics"]["weighted_f1"]["mean"] == pytest.approx(max(monitor), abs=1e-9)
    table = inference.predict([tmp_path / "run/fold_0/model"], pairs_dir, "both")
    stored = read_predictions(tmp_path / "run/predictions_test.csv")
    again = dict(zip(table.slide_id, table.probs))
    for slide, probs in zip(stored.slide_id, stored.probs):
        np.testing.assert_allclose(again[slide], probs, atol=1e-5)


def test_folds_by_group_replace_the_official_parts(pairs_dir, tmp_path):
    cfg = tiny_config(pairs_dir, data__official_split=False, split__n_folds=2, train__max_epochs=1)
    run.train(cfg, tmp_path / "run")
    table = read_predictions(tmp_path / "run/predictions_test.csv")
    assert len(table) == 36 and table.folds == (0, 1)


def opened(data, **changes):
    cfg = sharding.resolve_mesh(tiny_config(data, **changes))
    experiment = pair_experiment.load_experiment(cfg)
    return experiment, run.make_method(experiment)


def test_a_grade_absent_from_training_is_named(tmp_path):
    pair_files.bci(tmp_path / "s", train=3, test=4)
    pair_files.imported(tmp_path / "s", tmp_path / "data")
    experiment, method = opened(tmp_path / "data", train__b=2, split__val_fraction=0.0)
    with pytest.raises(ValueError, match=r"no training example has the label 3\+ \(0: 1, 1\+: 1, 2\+: 1, 3\+: 0\)"):
        pair_experiment.fold_data(experiment, 0, method)


def test_bad_requests_name_the_setting(pairs_dir, tmp_path):
    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            run.train(tiny_config(pairs_dir, **changes), tmp_path / "never")

    refused(r"there are only 16 training examples: lower train\.b", train__b=17)
    refused(r"8 images cannot be divided over mesh\.data=3", mesh__data=3)
    refused(r"mesh\.sequence=2 divides the patches of bags", mesh__sequence=2)
    refused(r"train\.batching=grad_cache holds one bag", train__batching="grad_cache")
    refused(r"data\.partner='masks' is unknown", data__partner="masks")
    refused(r"no partner vectors", data__partner="vector")
    refused(r"data\.resident=on keeps bags", data__resident="on")
    refused(r"early_stop\.monitor='f9' is unknown", early_stop__monitor="f9")
    refused(r"data\.kind='pears' is unknown", data__kind="pears")
    refused(r"sides must be multiples of 32", model__widths="8,8,8,8,8")
    assert not (tmp_path / "never/fold_0").exists()


def test_bags_and_pairs_are_told_apart(pairs_dir, tmp_path):
    with pytest.raises(ValueError, match="holds pairs, not bags"):
        run.train(config.load("configs/mkd.py:smoke", [f"data.dir={pairs_dir}"]), tmp_path / "run")
    assert data_kinds.kind_of(config.load("configs/mkd.py")) == "bags"


def test_images_of_another_size_and_missing_partners_are_refused(trained, tmp_path):
    for name, size in (("small", (8, 8)), ("fitting", (16, 16))):
        pair_files.write(tmp_path / name / "x.png", pair_files.noise(1, size))
    folder = trained / "fold_0/model"
    with pytest.raises(ValueError, match="images of 8x8 pixels, the model was trained on 16x16.*--resize 16x16"):
        inference.predict([folder], tmp_path / "small", "both")
    with pytest.raises(ValueError, match="mode 'both' reads the partner"):
        inference.predict([folder], tmp_path / "fitting", "both")


def test_a_sweep_trains_settings_and_seeds_one_by_one(pairs_dir, tmp_path):
    changes = {"train__max_epochs": 1, "split__val_fraction": 0.0}
    widths = {"wide": "8,8", "narrow": "8,4"}
    settings_of = {name: tiny_config(pairs_dir, model__widths=found, **changes) for name, found in widths.items()}
    plan = sweep.prepare(settings_of, "wide", (0, 1))
    found = sweep.train(plan, tmp_path / "sweep")
    assert found["failed"] == {} and "simulated images" in found["marks"]
    rows = {(row["setting"], row["metric"]) for row in found["rows"]}
    assert {("wide", "weighted_f1"), ("narrow", "accuracy")} <= rows
    table = (tmp_path / "sweep/narrow/seed_1/predictions_test.csv").read_bytes()
    assert sweep.train(plan, tmp_path / "sweep")["rows"] == found["rows"]
    assert (tmp_path / "sweep/narrow/seed_1/predictions_test.csv").read_bytes() == table
    run.train(tiny_config(pairs_dir, model__widths="8,4", seed=1, **changes), tmp_path / "alone")
    assert (tmp_path / "alone/predictions_test.csv").read_bytes() == table


def test_a_loss_that_is_not_finite_stops_the_run(pairs_dir, tmp_path):
    with pytest.raises(DivergedError, match="became NaN"):
        run.train(tiny_config(pairs_dir, train__lr=1e30), tmp_path / "run")


def test_unlabelled_examples_are_trained_without_a_loss(tmp_path):
    pair_files.bci(tmp_path / "s", train=8, test=4)
    rows = ["name,label"]
    for part, n in (("train", 8), ("test", 4)):
        rows += [
            f"{i:05d}_{part}_{pair_files.GRADES[i % 4]},{i % 2 if (part, i) != ('train', 3) else ''}" for i in range(n)
        ]
    (tmp_path / "l.csv").write_text("\n".join(rows) + "\n")
    manifest = pair_files.imported(tmp_path / "s", tmp_path / "data", labels=str(tmp_path / "l.csv")).manifest
    assert sum(e.label < 0 for e in manifest.examples) == 1 and len(pair_cohort(manifest, labelled=True)) == 11
    summary = run.train(
        tiny_config(tmp_path / "data", train__max_epochs=1, split__val_fraction=0.0, early_stop__monitor="accuracy"),
        tmp_path / "run",
    )
    lines = [json.loads(line) for line in (tmp_path / "run/fold_0/metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[0]["cross_entropy"]) and summary["modes"]["both"]["n_rows"] == 4
