"""`exp_paired_gain` at smoke size: the schema, continuing, one program for all settings, folds and the stated bound."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import common, exp_paired_gain, paired_gain  # noqa: E402

pytestmark = pytest.mark.bench


def start(tmp_path, *flags):
    command = [sys.executable, "-m", "benchmarks.exp_paired_gain", "--smoke", "--workdir", str(tmp_path / "runs")]
    command += ["--out", str(tmp_path / "result.json"), *flags]
    # Quick code: the smoke run waits for compilation alone.
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads((tmp_path / "result.json").read_text())


def test_smoke_run_writes_the_schema_and_continues(tmp_path):
    _, record = start(tmp_path, "--budget", "0")
    assert record["derived"]["table.simulated"] == "no training of the student alone is complete"
    shown, record = start(tmp_path)
    assert shown.count("simulated/") >= 12
    common.check_record(record)
    assert record["derived"]["complete.simulated"] == {"teacher": 2, **dict.fromkeys(paired_gain.SETTINGS, 2)}
    rows = [row for row in record["derived"]["table.simulated"] if row["metric"] == "accuracy"]
    assert {row["setting"] for row in rows} == {"teacher", *paired_gain.SETTINGS}
    compared = [row for row in rows if row["setting"] != "student_alone"]
    assert all(row["difference"] is not None and row["seeds_t"]["n"] == 2 for row in compared)
    assert record["config"]["simulated"]["image_side"] == 16 and record["config"]["simulated"]["simulated"] is True
    again, _ = start(tmp_path)
    assert "accuracy" not in again.split("{")[0], "what is complete is not trained again"


@pytest.mark.real_data
def test_real_crops_are_resized_and_said_so(real_data, tmp_path):
    graded, others = paired_gain.read_real(real_data / "paired_stains", 32)
    assert graded.image.shape == (16, 32, 32, 3) and np.bincount(graded.label).tolist() == [1, 2, 8, 5]
    assert len(others.label) == 36 and set(others.label) == {-1}
    fields = paired_gain.joined([graded, others]).fields()
    assert int(fields["has_label"].sum()) == 16 and int(fields["label"].min()) == 0
    for seed in range(3):
        fold = exp_paired_gain.fold_of_rows(graded.label, 4, seed)
        assert np.bincount(fold).tolist() == [4, 4, 4, 4]
        assert np.bincount(fold[graded.label == 2], minlength=4).tolist() == [2, 2, 2, 2]


def test_the_bound_is_that_of_an_ideal_reader_of_the_radius():
    rng = np.random.default_rng(0)
    grade = rng.integers(0, 4, 400_000)
    read = np.clip(np.round(rng.standard_normal(len(grade)) / 0.8 + grade), 0, 3)
    assert paired_gain.best_accuracy(0.8) == pytest.approx(np.mean(read == grade), abs=3e-3)


def test_the_simulation_is_that_of_the_command():
    spec = exp_paired_gain.SMALL
    pairs = paired_gain.simulated(spec, "test")
    image, partner = paired_gain.simulate.draw_pair(spec, spec.n_train + 5, 1)
    np.testing.assert_array_equal(pairs.image[5], image)
    np.testing.assert_array_equal(pairs.partner[5], partner)
    assert pairs.label[5] == 1


def test_weights_as_data_give_the_loss_of_the_method():
    """A setting without terms is the cross entropy alone, whatever the teacher says."""
    trainer = paired_gain.Trainer(paired_gain.Recipe(epochs=1, b=8, model=exp_paired_gain.TINY), 16)
    pairs = paired_gain.simulated(exp_paired_gain.SMALL, "train")
    params, extra = trainer.init(jax.random.key(0))
    table = trainer.ask(pairs, params["teacher"], extra["teacher"])
    zeros = {name: value * 0 for name, value in table.items()}
    alone = [trainer.student(pairs, 0, given, ())[2] for given in (table, zeros)]
    np.testing.assert_array_equal(*alone)
    taught = trainer.student(pairs, 0, table, paired_gain.SETTINGS["all"])[2]
    assert taught[0] > alone[0][0] + 1.0, "16 times the mean cosine distance of untrained networks, among others"
