"""Distillation with named terms through the shared trainer: both arms, schedules of weights, export."""

import json

import pytest
from survival_tiny import survival_dir

from histokd_jax.train import model_dir, run
from histokd_jax.utils import config

__all__ = ["survival_dir"]

SMALL = {
    "fold": "0",
    "data.chunk": "32",
    "data.row_multiple": "32",
    "student.abmil.width": "8",
    "student.abmil.attn": "4",
    "student.abmil.rho": "6",
    "train.b": "4",
    "train.max_epochs": "1",
    "report.bootstrap": "20",
    "eval.slots": "8",
    "survival.n_bins": "3",
}


@pytest.fixture(scope="module")
def finished(survival_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("distil") / "run"
    values = {**SMALL, "data.dir": str(survival_dir), "terms.sp.weight": "5.0", "terms.fitnet.weight": "1.0"}
    values |= {"terms.sp.schedule": "linear", "terms.sp.steps": "1000"}
    spec = "configs/distil.py:abmil,snn,terms=hazard+sp+fitnet,smoke"
    run.train(config.load(spec, [f"{key}={value}" for key, value in values.items()]), path)
    return path


def test_terms_are_logged_with_and_without_their_weights(finished):
    lines = [json.loads(line) for line in (finished / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    train = next(line for line in lines if line["split"] == "train")
    assert {"hazard", "sp", "fitnet", "weighted_sp", "taught"} <= set(train) and train["taught"] == 1
    assert 0 < train["weighted_sp"] < 5.0 * train["sp"] / 10, "the ramp has hardly begun"


def test_the_control_arm_has_no_term_and_the_export_no_connector(finished):
    control = json.loads((finished / "control" / "config.json").read_text())
    assert control["loss"]["lambda_terms"] == 0
    lines = (finished / "control" / "fold_0" / "metrics.jsonl").read_text().splitlines()
    assert not any("weighted_sp" in json.loads(line) for line in lines)
    assert list(model_dir.load(finished / "fold_0" / "model", "pathology").params) == ["student"]
