"""The table of a sweep: estimates, paired intervals, missing pairs, files."""

import csv
import json

import numpy as np
import pytest

from histokd_jax.evals import ablation, bootstrap, summary
from histokd_jax.evals.classification import classification_metrics
from histokd_jax.evals.predictions import concatenate, make_predictions

PER_FOLD, SEEDS, FOLDS = 20, (0, 1, 2), (0, 1)
MODES = ("pathology", "both")


def predictions(fold, seed, gain, modes=MODES):
    """Labels and slides depend on the fold only; scores on the seed and on how good the setting is."""
    labels = np.arange(PER_FOLD) % 2
    cases = [f"case{fold}_{i // 2}" for i in range(PER_FOLD)]
    slides = [f"slide{fold}_{i}" for i in range(PER_FOLD)]
    noise = np.random.default_rng((seed, fold)).normal(size=PER_FOLD)
    score = 1 / (1 + np.exp(-(noise + gain * (2 * labels - 1))))
    probs = np.stack([1 - score, score], axis=1)
    return concatenate([make_predictions(cases, slides, fold, mode, labels, probs) for mode in modes])


def runs(gain, **kw):
    return {(seed, fold): predictions(fold, seed, gain, **kw) for seed in SEEDS for fold in FOLDS}


def row(table, setting, mode="pathology", metric="auroc"):
    (found,) = [r for r in table["rows"] if (r["setting"], r["mode"], r["metric"]) == (setting, mode, metric)]
    return found


@pytest.fixture(scope="module")
def table():
    return ablation.ablation_table({"full": runs(0.6), "less": runs(0.1), "same": runs(0.6)}, "full", bootstrap=300)


def auc(gain, seed, fold):
    found = predictions(fold, seed, gain).of_mode("pathology")
    return float(classification_metrics(found.label, found.probs)["auroc"])


def test_means_and_differences_are_over_seeds_and_folds(table):
    full, less = (np.mean([auc(g, s, k) for s in SEEDS for k in FOLDS]) for g in (0.6, 0.1))
    assert row(table, "full")["mean"] == pytest.approx(full) and row(table, "full")["pairs"] == 6
    found = row(table, "less")
    assert found["difference"] == pytest.approx(less - full)
    assert found["ci"][0] < found["mean"] < found["ci"][1]
    assert found["difference_ci"][0] < found["difference"] < found["difference_ci"][1] < 0
    assert "loss" in found["verdict"] and found["seeds"] == 3


def test_t_interval_takes_one_difference_per_seed(table):
    per_seed = [np.mean([auc(0.1, s, k) - auc(0.6, s, k) for k in FOLDS]) for s in SEEDS]
    expected = bootstrap.paired_t_interval(per_seed)
    found = row(table, "less")["seeds_t"]
    assert found["ci"] == pytest.approx([expected.low, expected.high]) and found["n"] == 3


def test_a_setting_that_equals_the_reference_has_no_difference(table):
    found = row(table, "same")
    assert found["difference"] == 0 and found["difference_ci"] == [0, 0]
    assert row(table, "full")["difference"] is None


def test_one_seed_gives_the_intervals_of_the_summary():
    one = {
        "full": {(0, k): predictions(k, 0, 0.6) for k in FOLDS},
        "less": {(0, k): predictions(k, 0, 0.1) for k in FOLDS},
    }
    table = ablation.ablation_table(one, "full", bootstrap=300, seed=4)
    a, b = (concatenate(list(one[name].values())) for name in ("less", "full"))
    expected = summary.compare(a, b, bootstrap=300, seed=4)["modes"]["pathology"]["metrics"]["auroc"]
    found = row(table, "less")
    assert found["difference"] == pytest.approx(expected["difference"])
    assert found["difference_ci"] == pytest.approx(expected["ci"])
    assert "at least 2" in found["seeds_t"]["reason"]


def test_missing_pairs_are_left_out_of_both_sides():
    less = runs(0.1)
    del less[1, 0]
    table = ablation.ablation_table({"full": runs(0.6), "less": less}, "full", bootstrap=50)
    pairs = [(s, k) for s in SEEDS for k in FOLDS if (s, k) != (1, 0)]
    assert row(table, "less")["pairs"] == 5
    assert row(table, "less")["difference"] == pytest.approx(np.mean([auc(0.1, *p) - auc(0.6, *p) for p in pairs]))


def test_modes_that_a_setting_lacks_are_left_out(table):
    student = runs(0.1, modes=("pathology",))
    found = ablation.ablation_table({"full": runs(0.6), "student": student}, "full", bootstrap=50)
    assert [r["setting"] for r in found["rows"] if r["mode"] == "both"] == ["full"] * len(ablation.CLASSIFICATION.names)
    odd = ablation.ablation_table({"full": runs(0.6, modes=("pathology",)), "b": runs(0.1)}, "full", bootstrap=50)
    assert row(odd, "b", "both")["reason"] == "the reference has no such mode"


def test_other_slides_are_refused():
    other = {(0, 0): predictions(1, 0, 0.1), (0, 1): predictions(0, 0, 0.1)}
    with pytest.raises(ValueError, match="setting other, seed 0, fold 0.*other slides"):
        ablation.ablation_table({"full": runs(0.6), "other": other}, "full", bootstrap=50)
    with pytest.raises(ValueError, match="reference setting 'full' has no predictions"):
        ablation.ablation_table({"full": {}, "other": runs(0.1)}, "full")


def test_files_hold_the_same_numbers_and_name_what_failed(table, tmp_path):
    facts = {"title": "Ablations", "marks": ["simulated bags"], "failed": {"bad, seed 0, fold 1": "loss became NaN"}}
    ablation.write_table(tmp_path, table, facts)
    text = (tmp_path / "table.md").read_text()
    assert "# Ablations (simulated bags)" in text and "- bad, seed 0, fold 1: loss became NaN" in text
    assert "## AUROC, mode pathology" in text and "one difference per seed" in text
    with (tmp_path / "table.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(table["rows"]) == 3 * 2 * 3
    saved = json.loads((tmp_path / "table.json").read_text())
    for a, b, c in zip(rows, saved["rows"], table["rows"], strict=True):
        assert float(a["mean"]) == b["mean"] == c["mean"] and a["setting"] == b["setting"]
        assert f"{c['mean']:.3f}" in text
