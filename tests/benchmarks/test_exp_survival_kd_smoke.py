"""`exp_survival_kd`: arms that differ in the teacher only, and the smoke run on invented tables."""

import argparse
import csv
import json
import pathlib
import subprocess
import sys

import pytest
from test_exp_survival_genes_smoke import write_cohort

from histokd_jax.methods import registry
from histokd_jax.utils import config

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import exp_survival_kd as exp  # noqa: E402


def arguments(data="data", workdir="work"):
    return argparse.Namespace(data=pathlib.Path(data), workdir=pathlib.Path(workdir), smoke=False)


def test_arms_have_the_same_student_and_training():
    flat = {}
    for arm, (spec, _) in exp.ARMS.items():
        cfg = config.load(spec, exp.overrides(arguments(), arm, 1, pathlib.Path("cohort")))
        registry.method_module(cfg.method).validate(cfg)
        assert not cfg.early_stop.enabled and not cfg.compare.control and cfg.seed == 1
        flat[arm] = config.flatten(cfg)
    alone = flat[exp.ALONE]
    shared = [
        key for key in alone if key.startswith(("train.", "split.", "survival.", "data.")) and key != "data.genes"
    ]
    for arm, own in flat.items():
        assert {key: own[key] for key in shared} == {key: alone[key] for key in shared}, arm
        if arm != exp.ALONE:
            student = {key: own[f"student.{key.removeprefix('model.')}"] for key in alone if key.startswith("model.")}
            assert student == {key: alone[key] for key in student}, arm
            assert own["genes.clip"] == 5.0 and own["loss.lambda_hazard"] > 0
    assert len({(own.get("teacher.name"), own.get("teacher.abmil.fusion")) for own in flat.values()}) == len(exp.ARMS)


@pytest.mark.bench
def test_smoke_run_compares_every_student_with_the_one_alone_and_continues(tmp_path):
    data = write_cohort(tmp_path / "data", "mcat", "blca", n=60, genes=40)
    with (exp.exp_ghanet.tables(arguments(data))[1]).open("w", newline="") as stream:
        csv.writer(stream).writerows([("first", "second"), *((f"G{i}", f"G{i + 20}") for i in range(20))])
    out, command = tmp_path / "exp.json", [sys.executable, "-m", "benchmarks.exp_survival_kd", "--smoke"]
    command += ["--data", str(data), "--out", str(out), "--workdir", str(tmp_path / "work")]
    part = subprocess.run([*command, "--only", "alone"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert part.returncode == 0 and not out.exists(), part.stderr[-3000:]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())["derived"]
    assert found["smoke"] and [row["setting"] for row in found["students"]] == list(exp.ARMS)
    assert [row["setting"] for row in found["teachers"]] == [arm for arm in exp.ARMS if arm != exp.ALONE]
    for row in found["students"][1:]:
        assert row["difference_ci"][0] <= row["difference"] <= row["difference_ci"][1]
    for metrics in found["all_metrics_of_first_seed"].values():
        assert set(metrics) == {"c_index", "c_ipcw", "iauc", "ibs"}
    folds = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("fold.json")}
    assert len(folds) == len(exp.ARMS)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and folds == {path: path.stat().st_mtime_ns for path in folds}
