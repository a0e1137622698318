"""`exp_mil_bags` in smoke mode on a toy benchmark, and its training loop against known answers."""

import gzip
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import exp_mil_bags, mil_bags  # noqa: E402
from data_pipelines.mil_classic import MilBags  # noqa: E402

pytestmark = pytest.mark.bench


def toy(n=24, width=5, seed=0):
    """Bags of 1 to 11 instances; a positive bag has one instance far out along the first feature."""
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % 2).astype(np.int32)
    features = [rng.normal(size=(1 + k % 11, width)) for k in range(n)]
    for x, positive in zip(features, label):
        x[0, 0] += 6 * positive
    return MilBags("musk1", tuple(features), label, tuple(map(str, range(n))))


def write_csv(folder, bags):
    folder.mkdir(parents=True)
    rows = [",".join(map(str, (y, i, *row))) for x, y, i in zip(bags.features, bags.label, bags.bag_id) for row in x]
    (folder / "musk1.csv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))


def test_smoke_run_writes_the_schema_and_continues(tmp_path):
    write_csv(tmp_path / "data" / "mil_classic", toy())
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.exp_mil_bags", "--smoke", "--data", str(tmp_path / "data")]
    command += ["--workdir", str(tmp_path / "runs"), "--out", str(out), "--only", "musk1/gated_abmil"]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "seed 0" not in done.stdout, "what is complete is not trained again"
    derived = json.loads(out.read_text())["derived"]
    assert derived["smoke"] and set(derived) == {"smoke", "musk1"} and set(derived["musk1"]) == {"gated_abmil"}
    found = derived["musk1"]["gated_abmil"]
    assert found["accuracy"]["runs"] == 2 and found["published_accuracy"] == {"mean": 0.9, "sd": 0.05}


@pytest.mark.parametrize("model", ["gated_abmil", "dsmil"])
def test_a_separable_benchmark_is_learned_and_loops_agree(model):
    recipe = mil_bags.Recipe(lr=3e-3, wd=0.0, epochs=25, dropout=0.0)
    found = {
        loop: mil_bags.cross_validate(toy(), mil_bags.MODELS[model], recipe, [0], 3, loop) for loop in ("map", "vmap")
    }
    assert np.mean(found["map"]["accuracy"]) >= 0.8
    np.testing.assert_allclose(found["map"]["train_loss"], found["vmap"]["train_loss"], rtol=0.05, atol=1e-3)


def test_folds_hold_every_bag_once_and_training_never_sees_its_test_bags():
    label = toy().label
    for seed in (0, 1):
        parts = mil_bags.folds(label, 5, seed)
        np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in parts])), np.arange(len(label)))
        assert all(not set(train) & set(test) for train, test in parts)
        longest = max(len(train) for train, _ in parts)
        for number, (train, _) in enumerate(parts):
            rows = np.asarray(mil_bags._inputs(toy(), train, longest, seed, number)[2])
            assert len(rows) == longest and set(rows.tolist()) == set(train.tolist())


def test_summary_is_mean_and_deviation_of_runs():
    parts = [{m: [0.8, 1.0] for m in ("accuracy", "auroc", "train_loss")}] * 2
    parts = [*parts, {m: [0.4, 0.6] for m in ("accuracy", "auroc", "train_loss")}]
    found = exp_mil_bags.summary(parts, "fox", "abmil")["accuracy"]
    values = np.array([0.8, 1.0, 0.8, 1.0, 0.4, 0.6])
    assert found["mean"] == pytest.approx(values.mean()) and found["sd_runs"] == pytest.approx(values.std())
    assert found["sd_seed_means"] == pytest.approx(np.std([0.9, 0.9, 0.5])) and found["runs"] == 6
