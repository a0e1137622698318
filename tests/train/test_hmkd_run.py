"""HM-KD end to end on tiny simulated pairs: two stages, a teacher of another run, cached outputs, export, a sweep."""

import json
import shutil

import jax
import numpy as np
import pytest

from data_pipelines.pairs.simulate import PairSpec, simulate_pairs
from histokd_jax import inference
from histokd_jax.cli.main import main
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.train import frozen_models, model_dir, pair_attention, run
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.utils import config

# Minutes of compilation when the cache is cold: the fast tests of the same loop are in test_pair_run.py.
pytestmark = pytest.mark.long
SPEC = PairSpec(n_train=16, n_test=8, size=64, per_group=1)
SETTINGS = {"train.max_epochs": "1", "report.bootstrap": "20", "compare.control": "False", "train.b": "8"}


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "sim"
    simulate_pairs(path, SPEC)
    return path


def tiny(data, words="smoke", **changes):
    values = {**SETTINGS, "data.dir": str(data), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    return config.load(f"configs/hmkd.py:{words}", [f"{key}={value}" for key, value in values.items()])


@pytest.fixture(scope="module")
def two_stage(pairs_dir, tmp_path_factory):
    """Teacher, then student, three epochs each; read only."""
    path = tmp_path_factory.mktemp("two") / "run"
    run.train(tiny(pairs_dir, train__max_epochs=3), path)
    return path


def lines_of(workdir, split):
    lines = [json.loads(line) for line in (workdir / "fold_0/metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def test_two_stages_leave_both_networks_with_their_running_statistics(two_stage):
    folders = {p.name for p in (two_stage / "fold_0/model").iterdir() if p.is_dir()}
    assert folders == {"teacher", "student", "extra_teacher", "extra_student"}
    summary = json.loads((two_stage / "summary.json").read_text())
    assert set(summary["modes"]) == {"he", "he+ihc"} and summary["modes"]["he"]["n_rows"] == 8
    lines = lines_of(two_stage, "train")
    assert [line["stage"] for line in lines] == ["teacher"] * 3 + ["student"] * 3
    assert json.loads((two_stage / "fold_0/fold.json").read_text())["traces"] == 2, "one step per stage is compiled"
    assert all(0.0 <= line["input_bound_fraction"] <= 1.0 for line in lines)


def test_the_exported_student_alone_predicts_what_the_run_predicted(two_stage, pairs_dir, tmp_path):
    bare = shutil.copytree(two_stage / "fold_0/model", tmp_path / "model")
    for name in ("teacher", "extra_teacher"):
        shutil.rmtree(bare / name)
    table = inference.predict([bare], pairs_dir, "he", labels="own").of_mode("he").sorted()
    stored = read_predictions(two_stage / "predictions_test.csv").of_mode("he").sorted()
    rows = np.isin(table.slide_id, stored.slide_id)
    assert table.slide_id[rows].tolist() == stored.slide_id.tolist()
    np.testing.assert_allclose(table.probs[rows], stored.probs, atol=1e-5)
    with pytest.raises(CheckpointMismatchError, match="no parameters 'teacher'"):
        inference.predict([bare], pairs_dir, "he+ihc")


def test_a_finished_teacher_is_neither_trained_nor_written_again(two_stage, pairs_dir, tmp_path):
    cfg = tiny(pairs_dir, distill__teacher=two_stage)
    run.train(cfg, tmp_path / "run")
    assert {p.name for p in (tmp_path / "run/fold_0/model").iterdir() if p.is_dir()} == {"student", "extra_student"}
    frozen = frozen_models.read(cfg, model_dir.rebuild(model_dir.read_facts(two_stage / "fold_0/model"))[1], 0)
    teacher = model_dir.load(two_stage / "fold_0/model", "he+ihc")
    for a, b in zip(jax.tree.leaves(frozen.groups["teacher"]["params"]), jax.tree.leaves(teacher.params), strict=True):
        np.testing.assert_array_equal(a, b)
    facts = json.loads((tmp_path / "run/run_manifest.json").read_text())
    assert frozen_models.OTHER_SPLIT not in facts.get("marks", [])
    cached = tiny(pairs_dir, "smoke,cached", distill__teacher=two_stage)
    run.train(cached, tmp_path / "cached")
    beside, table = (read_predictions(tmp_path / f"{name}/predictions_test.csv") for name in ("run", "cached"))
    np.testing.assert_allclose(beside.probs, table.probs, atol=1e-4)


def test_a_teacher_of_other_widths_or_none_is_refused(two_stage, pairs_dir, tmp_path):
    cfg = tiny(pairs_dir, distill__teacher=two_stage, model__widths="32,40,48,72")
    with pytest.raises(CheckpointMismatchError, match="the teacher does not fit this configuration .*other widths"):
        run.train(cfg, tmp_path / "run")
    with pytest.raises(ValueError, match="holds no trained model of fold 0"):
        run.train(tiny(pairs_dir, distill__teacher=tmp_path), tmp_path / "none")


def test_the_selected_epoch_keeps_its_own_running_statistics(two_stage):
    """T5: parameters and statistics belong to the first best epoch, so the exported networks score as recorded."""
    facts = json.loads((two_stage / "fold_0/fold.json").read_text())
    modes = json.loads((two_stage / "summary.json").read_text())["modes"]
    for stage, mode in (("teacher", "he+ihc"), ("student", "he")):
        monitor = [line["monitor"] for line in lines_of(two_stage, "val") if line["stage"] == stage]
        assert modes[mode]["metrics"]["weighted_f1"]["mean"] == pytest.approx(max(monitor), abs=1e-6), stage
    best = facts["progress"]["stopper"]["best_epoch"]
    assert best == monitor.index(max(monitor))


def test_a_sweep_of_the_terms_ends_with_the_table_of_what_they_bought(two_stage, pairs_dir, tmp_path, capsys):
    """Pairs are swept one by one, with the teacher of a finished run."""
    values = {**SETTINGS, "data.dir": str(pairs_dir), "distill.teacher": str(two_stage)}
    arguments = ["sweep", "--config", "configs/ablations/hmkd.py:smoke", "--workdir", str(tmp_path)]
    arguments += ["--seeds", "0", "--only", "student_alone"]
    assert main([*arguments, *(f"--config.{key}={value}" for key, value in values.items())]) == 0
    shown = capsys.readouterr().out
    assert "| student_alone | 1 |" in shown and "simulated images" in shown and "## Weighted F1, mode he" in shown
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["reference"] == "all_terms" and not table["failed"]
    rows = {row["setting"]: row for row in table["rows"] if row["metric"] == "weighted_f1" and row["mode"] == "he"}
    assert set(rows) == {"all_terms", "student_alone"} and rows["student_alone"]["difference"] is not None
    for setting in rows:
        assert (tmp_path / setting / "seed_0" / "fold_0" / "model" / "student").is_dir()
        assert not (tmp_path / setting / "seed_0" / "control").exists()


def test_attention_of_teacher_and_student_is_written_and_drawn_side_by_side(two_stage, pairs_dir, tmp_path):
    arguments = ["--model", str(two_stage), "--data", str(pairs_dir), "--out", str(tmp_path / "p.csv")]
    more = ["--attention", str(tmp_path / "a"), "--pictures", str(tmp_path / "b"), "--picture-count", "2"]
    assert main(["predict", *arguments, *more]) == 0
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 24
    rows = np.loadtxt(files[0], delimiter=",", skiprows=1)
    assert rows.shape == (64, 3) and rows[:, 2].sum() == pytest.approx(1.0, abs=1e-5)
    pictures = sorted((tmp_path / "b").iterdir())
    assert len(pictures) == 2 and pictures[0].read_bytes()[:4] == b"\x89PNG"
    shown = pair_attention.attend_all(two_stage / "fold_0/model", pairs_dir, 1)[0]
    assert set(shown.maps) == {"he", "he+ihc"} and shown.partner.shape == (64, 64, 3)
