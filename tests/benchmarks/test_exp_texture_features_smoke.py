"""`exp_texture_features` on a toy file of the same layout, and its folds, batches and scores against known answers."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import common, exp_texture_features, texture  # noqa: E402

pytestmark = pytest.mark.bench
WIDTHS = dict(zip(texture.FAMILIES, (5, 10, 5, 6, 20, 38)))


def toy(n_class=90, classes=3, seed=0):
    """Features whose class means differ, weakly in the first family; one absent value."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(classes), n_class)
    made = {}
    for k, (name, width) in enumerate(WIDTHS.items()):
        centres = rng.normal(size=(classes, width)) * (0.3 + 0.3 * k)
        made[name] = (centres[label] + rng.normal(size=(len(label), width))).astype(np.float32)
    made["perceptual"][3, 1] = np.nan
    return {**made, "label": label.astype(np.int8), "source_row": np.arange(len(label), dtype=np.int32) * 2,
            "class_names": np.array([f"0{c}_X" for c in range(classes)])}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data" / "texture_features").mkdir(parents=True)
    made, order = toy(), np.random.default_rng(1).permutation(270)
    stored = {name: value if name == "class_names" else value[order] for name, value in made.items()}
    np.savez(tmp_path / "data" / texture.FILE, **stored)
    return tmp_path


def test_smoke_run_writes_the_schema_and_continues(folder):
    out = folder / "result.json"
    command = [sys.executable, "-m", "benchmarks.exp_texture_features", "--smoke", "--data", str(folder / "data")]
    names = ("student_alone", "kd", "fitnet", "crd", "dml", "srrl", "queue_infonce")
    command += ["--workdir", str(folder / "runs"), "--out", str(out), "--only"]
    command += [f"histogram_lower/{name}" for name in names]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "histogram_lower/kd:" not in done.stdout, "what is complete is not trained again"
    record = json.loads(out.read_text())
    common.check_record(record)
    rows = record["derived"]["ranked.histogram_lower"]
    assert {row["term"] for row in rows} == set(names[1:]) and record["derived"]["complete_families"] == ""
    assert all(row["ci_low"] <= row["difference"] <= row["ci_high"] and row["diverged"] == 0 for row in rows)
    assert "leakage cannot be excluded" in record["config"]["split"] and "leakage" in record["notes"]
    assert record["config"]["absent_values"]["perceptual"] == 1


def test_rows_are_put_in_the_order_of_the_file_and_folds_are_contiguous_blocks(folder):
    patches = texture.read(folder / "data")
    np.testing.assert_array_equal(patches.features["f_lbp"], toy()["f_lbp"])
    fold = texture.fold_of_rows(patches.label, 5)
    for c in range(3):
        own = fold[patches.label == c]
        assert np.all(np.diff(own) >= 0) and np.bincount(own).tolist() == [18] * 5


def test_standardisation_sees_the_training_rows_only_and_fills_absent_values():
    x = toy()["perceptual"]
    train = np.arange(270) % 5 > 0
    z = texture.standardised(x, train, 5.0)
    spoiled = np.where(train[:, None], x, 1e6)
    np.testing.assert_array_equal(texture.standardised(spoiled, train, 5.0)[train], z[train])
    assert z[3, 1] == 0.0 and np.isfinite(z).all()
    np.testing.assert_allclose(z[train].mean(0), 0.0, atol=0.05)


def test_batches_hold_training_rows_and_contrasts_other_classes():
    label, train = toy()["label"], np.flatnonzero(np.arange(270) % 5 > 0)
    recipe = texture.Recipe(epochs=3, b=16)
    order = texture.orders(train, recipe, 0, 0, len(train) // 16)
    assert order.shape == (3 * (len(train) // 16), 16) and set(order.ravel()) <= set(train)
    assert len(set(order[: len(train) // 16].ravel())) == 16 * (len(train) // 16), "no row twice in an epoch"
    rows = texture.class_rows(label, train, 3, 80)
    assert all(set(rows[c]) <= set(train) and np.all(label[rows[c]] == c) for c in range(3))


def test_scores_judge_every_row_by_the_training_that_did_not_see_it(folder):
    study = texture.Study(texture.read(folder / "data"), texture.Recipe(), (0, 1), 5)
    logits = np.zeros((10, 270, 3))
    for run, (_, fold) in enumerate(study.runs):
        held_out = study.fold == fold
        logits[run, held_out, study.patches.label[held_out]] = 5.0
    found = study.scores(logits)
    assert found["correct"].all() and found["correct"].shape == (2, 270)
    np.testing.assert_allclose(found["nll"], np.log(np.exp(5) + 2) - 5, rtol=1e-5)


def test_bootstrap_draws_whole_blocks_within_classes():
    weights = exp_texture_features.block_weights(toy()["label"], 50)
    blocks = weights.reshape(50, 3, 90)
    assert np.all(weights[:, :21] == weights[:, :1]) and np.std(weights[:, 0]) > 0
    assert np.all(blocks[:, :, ::21].sum(-1) == 5), "as many blocks of a class as it has"


def test_every_entry_of_the_catalogue_is_run_or_named_with_a_reason():
    from histokd_jax.losses.catalogue import CATALOGUE

    settings = exp_texture_features.settings(600)
    assert set(CATALOGUE) == (set(settings) | set(exp_texture_features.not_applicable())) & set(CATALOGUE)
    assert len(settings) >= 28 and settings["dkd"].terms["dkd"]["steps"] == 50
