"""MoMKD end to end through the shared trainer: run, resume, control arm, prediction from slides alone, attention."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from data_pipelines import schema
from data_pipelines.manifest import Manifest
from data_pipelines.pipeline import make_eval_dataset
from data_pipelines.writer import DatasetWriter
from histokd_jax import inference
from histokd_jax.cli.main import main
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.train import experiment, model_dir, preparation, run, signals, sweep
from histokd_jax.train.signals import Interrupted
from histokd_jax.train.state import init_params
from histokd_jax.utils import config

CONFIG = "configs/momkd.py:er,fold=0,smoke"
SETTINGS = {
    "model.d": 8,
    "model.d_gene": 8,
    "model.gene_hidden": 8,
    "model.sphere": 6,
    "model.codes": 3,
    "model.head_hidden": 6,
    "genes.top_k": 16,
    "memory.kmeans_pool": 120,
    "data.row_multiple": 32,
    "train.b": 4,
    "train.max_epochs": 3,
    "train.plateau_patience": 1,
    "early_stop.enabled": False,
    "compare.control": False,
    "ckpt.every_epochs": 1,
    "report.bootstrap": 50,
    "eval.slots": 8,
}
cohort_dir = tiny.cohort_dir


def overrides(data, **changes):
    values = {**SETTINGS, "data.dir": str(data), **{k.replace("__", "."): v for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


def load(data, **changes):
    return config.load(CONFIG, overrides(data, **changes))


@pytest.fixture(scope="module")
def trained(cohort_dir, tmp_path_factory):
    """A finished run of one fold with its control arm; read only."""
    path = tmp_path_factory.mktemp("momkd") / "run"
    run.train(load(cohort_dir, compare__control=True), path)
    return path


class StopAfter(signals.StopRequest):
    """A request that arrives after a number of steps, without any signal."""

    def __init__(self, count):
        super().__init__()
        self._left = count

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


def leaves(workdir):
    return jax.tree.leaves(model_dir.load(workdir / "fold_0" / "model", "pathology").params)


def losses(workdir):
    lines = (workdir / "fold_0" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_a_run_is_complete_and_the_control_trains_without_genes(trained):
    for arm in (trained, trained / "control"):
        table = read_predictions(arm / "predictions_test.csv")
        assert set(table.mode) == {"pathology"} and np.isfinite(table.probs).all()
        assert np.isfinite(losses(arm)).all() and len(losses(arm)) == 3
    control = json.loads((trained / "control" / "config.json").read_text())["loss"]
    assert (control["alpha_gene"], control["lambda_rec"], control["alpha_wsi"]) == (0, 0, 0.2)
    lines = [json.loads(line) for line in (trained / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    shown = {"ce", "align_slide", "align_gene", "rec", "mem", "commit", "orth", "acc", "gap_slide", "gap_gene"}
    assert shown <= set(lines[0])
    assert json.loads((trained / "fold_0" / "fold.json").read_text())["traces"] == 1
    twice = json.loads((trained / "thresholded.json").read_text())["pathology"]
    summary = json.loads((trained / "summary.json").read_text())["modes"]["pathology"]["metrics"]
    assert len(twice["thresholds"]) == 1 and set(twice["arg_max"]) == set(twice["val_f1"])
    assert twice["free"]["auroc"]["mean"] == pytest.approx(summary["auroc"]["mean"])


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(cohort_dir, trained, tmp_path, monkeypatch):
    cfg = load(cohort_dir)
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", lambda: StopAfter(4))
        with pytest.raises(Interrupted):
            run.train(cfg, tmp_path)
    run.train(cfg, tmp_path)
    for a, b in zip(leaves(trained), leaves(tmp_path), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(trained) == losses(tmp_path)


def test_batches_hold_the_graph_and_memories_start_at_patches_of_their_class(cohort_dir):
    cfg = load(cohort_dir)
    opened = experiment.load_experiment(experiment.resolve_width(cfg))
    method = run.make_method(opened)
    data = experiment.fold_data(opened, 0, method)
    batch = next(iter(make_eval_dataset(data.evaluation["test"], num_threads=0)))
    assert batch[schema.NEIGHBOURS].shape[-1] == 8 and (batch[schema.NEIGHBOURS] != 0).any()
    params, extra, _ = init_params(method, cfg.seed)
    mesh = run.make_programs(opened, method).mesh
    feeder = experiment.make_feeder(opened.cfg, mesh, [data.train])
    found = [preparation.prepare(method, opened.cfg, data.train, feeder, params, extra)[0] for _ in range(2)]
    codes = [np.asarray(p["MEMORY"]["codes"]) for p in found]
    np.testing.assert_array_equal(*codes)
    np.testing.assert_allclose(np.linalg.norm(codes[0], axis=2), 1, rtol=1e-5)
    assert not np.allclose(codes[0], params["MEMORY"]["codes"])
    for group in ("SLIDE", "GENES"):
        jax.tree.map(np.testing.assert_array_equal, found[0][group], params[group])


def test_prediction_and_attention_from_slides_alone(trained, cohort_dir, tmp_path):
    """No gene branch, no tables: the exported SLIDE and MEMORY are enough."""
    model = shutil.copytree(trained / "fold_0" / "model", tmp_path / "model")
    assert {p.name for p in model.iterdir() if p.is_dir()} == {"SLIDE", "MEMORY", "GENES"}
    shutil.rmtree(model / "GENES")
    bare = shutil.copytree(cohort_dir, tmp_path / "data")
    shutil.rmtree(bare / "tables")
    out = tmp_path / "p.csv"
    arguments = ["predict", "--model", str(model), "--data", str(bare), "--out", str(out)]
    assert main([*arguments, "--attention", str(tmp_path / "a")]) == 0
    found = read_predictions(out)
    prob = dict(zip(found.slide_id, found.probs[:, 1]))
    table = read_predictions(trained / "predictions_test.csv")
    np.testing.assert_allclose([prob[slide] for slide in table.slide_id], table.probs[:, 1], atol=1e-5)
    manifest = Manifest.load(cohort_dir)
    for slide in manifest.slides[:3]:
        with open(tmp_path / "a" / f"{slide.slide_id}.csv") as stream:
            rows = list(csv.DictReader(stream))
        assert len(rows) == slide.n_patches and min(int(row["x"]) for row in rows) >= 0
        assert sum(float(row["attention"]) for row in rows) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("update", [pytest.param("fixed", marks=pytest.mark.slow), "ema"])
def test_memories_without_gradient_are_state_that_predict_finds(cohort_dir, tmp_path, update):
    run.train(load(cohort_dir, memory__update_by=update, train__max_epochs=1), tmp_path)
    model = tmp_path / "fold_0" / "model"
    assert {p.name for p in model.iterdir() if p.is_dir()} == {"SLIDE", "GENES", "extra_SLIDE"}
    loaded = model_dir.load(model, "pathology")
    assert set(loaded.params) == {"SLIDE"} and loaded.extra["SLIDE"]["codes"].shape == (2, 3, 6)
    found = inference.predict([model], cohort_dir, "pathology")
    table = read_predictions(tmp_path / "predictions_test.csv")
    prob = dict(zip(found.slide_id, found.probs[:, 1]))
    np.testing.assert_allclose([prob[slide] for slide in table.slide_id], table.probs[:, 1], atol=1e-5)


def test_test_slides_without_a_graph_can_be_left_out_and_are_counted(cohort_dir):
    sizes = {slide.case_id: slide.n_patches for slide in Manifest.load(cohort_dir).slides}
    k = int(np.median(list(sizes.values())))
    found = {}
    for choice in ("predict", "skip"):
        opened = experiment.load_experiment(
            experiment.resolve_width(load(cohort_dir, graph__k=k, eval__edgeless=choice))
        )
        found[choice] = experiment.fold_data(opened, 0, run.make_method(opened))
    kept = [opened.cohort.case_id[row] for row in found["skip"].split.test]
    everyone = [opened.cohort.case_id[row] for row in found["predict"].split.test]
    assert kept == [case for case in everyone if sizes[case] > k] and 0 < len(kept) < len(everyone)
    assert found["skip"].marks == (f"{len(everyone) - len(kept)} test samples without a graph left out "
                                   "(eval.edgeless=skip)",)  # fmt: skip
    assert found["predict"].marks == ()


def test_data_without_coordinates_are_refused_by_name(cohort_dir, trained, tmp_path):
    with DatasetWriter(tmp_path / "d", name="bare", feat_dim=12, encoder={"name": "x", "licence": "y"}, mpp=0.5) as out:
        out.add("S-1", "C-1", np.zeros((20, 12), np.float32))
    arguments = ["predict", "--model", str(trained / "fold_0" / "model"), "--data", str(tmp_path / "d")]
    with pytest.raises(Exception, match="20 patches has no coordinates"):
        inference.predict([trained / "fold_0" / "model"], tmp_path / "d", "pathology")
    assert main([*arguments, "--out", str(tmp_path / "p.csv")]) == 1


def test_resident_cohorts_refuse_graphs(cohort_dir, tmp_path):
    with pytest.raises(ValueError, match="no neighbour graph.*data.resident=off"):
        run.train(load(cohort_dir, data__resident="on"), tmp_path / "run")


def test_a_step_holds_exactly_one_slide_by_default(cohort_dir):
    cfg = load(cohort_dir, train__b=1)
    opened = experiment.load_experiment(experiment.resolve_width(cfg))
    plan = experiment.fold_data(opened, 0, run.make_method(opened)).train.plan
    assert ((plan.slide >= 0).sum(axis=2) == 1).all() and plan.steps_per_epoch == len(plan.sizes)


@pytest.mark.slow
def test_trainings_of_a_sweep_equal_those_trained_alone(cohort_dir, tmp_path):
    """Prepared memories, weights as data, falling rates: replicas of one program."""
    texts = overrides(cohort_dir, early_stop__enabled=True, early_stop__patience=1, early_stop__min_epoch=0)
    settings, reference = config.load_sweep(
        "configs/ablations/momkd.py:er,smoke,fold=0,terms", texts, ["full", "gene_alignment", "without_reconstruction"]
    )
    prepared = sweep.prepare(settings, reference, (0, 1))
    assert len(prepared.groups) == 1
    sweep.train(prepared, tmp_path / "swept")
    for name in settings:
        alone = tmp_path / "alone" / name
        run.train(sweep._plain(settings[name], 1), alone)
        a, b = (read_predictions(p / "predictions_test.csv") for p in (alone, tmp_path / "swept" / name / "seed_1"))
        np.testing.assert_allclose(a.probs, b.probs, atol=2e-4)
