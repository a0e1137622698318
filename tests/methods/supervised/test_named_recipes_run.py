"""The named configurations of supervised baselines really train: two epochs on a tiny survival cohort, tiny widths."""

import csv

import numpy as np
import pytest
import survival_tiny
from survival_tiny import survival_dir

from data_pipelines.tables import read_gene_table
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.evals.survival_predictions import read_survival_predictions
from histokd_jax.train import run
from histokd_jax.utils import config

__all__ = ["survival_dir"]

SHARED = {key: value for key, value in survival_tiny.SETTINGS.items() if not key.startswith("model.")}
RUNS = {
    "abmil,published": {"model.abmil.width": 8, "model.abmil.attn": 4, "model.abmil.rho": 8},
    "clam_sb": {"model.clam_sb.width": 8, "model.clam_sb.attn": 4, "model.clam_sb.instances": 2},
    "transmil": {
        "model.transmil.width": 8,
        "model.transmil.heads": 2,
        "model.transmil.landmarks": 4,
        "model.transmil.tile": 32,
    },
    "mcat": {"model.mcat.width": 8},
    "survpath,published": {
        "model.survpath.width": 8,
        "model.survpath.attn": 4,
        "model.survpath.hidden": 4,
        "model.survpath.bag_size": 40,
        "data.max_patches_train": 40,
    },
    "transmil,classification,published": {
        "model.transmil.width": 8,
        "model.transmil.heads": 2,
        "model.transmil.landmarks": 4,
        "model.transmil.tile": 32,
    },
}
GROUPED = ("mcat", "survpath,published")
QUICK = ("abmil,published", "clam_sb")


def signatures(survival_dir, path):
    """A file of two gene groups of the cohort."""
    names = read_gene_table(survival_dir / "tables" / "genes.npz").names
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("first", "second"), *zip(names[:5], names[5:10])])
    return path


@pytest.mark.parametrize("arg", [arg if arg in QUICK else pytest.param(arg, marks=pytest.mark.slow) for arg in RUNS])
def test_a_named_configuration_trains(arg, survival_dir, tmp_path):
    settings = {**SHARED, **RUNS[arg], "data.dir": survival_dir, "train.b": 12, "split.val_fraction": 0.0}
    if arg in GROUPED:
        settings |= {"genes.signatures": signatures(survival_dir, tmp_path / "s.csv"), "genes.suffixes": "('',)"}
    if arg == "survpath,published":
        del settings["train.b"]
    cfg = config.load(f"configs/supervised.py:{arg}", [f"{key}={value}" for key, value in settings.items()])
    run.train(cfg, tmp_path / "run")
    path = tmp_path / "run" / "predictions_test.csv"
    classes = cfg.task_kind == "classification"
    found = read_predictions(path).probs[:, 1] if classes else read_survival_predictions(path).risk
    assert len(found) == 24 and np.isfinite(found).all() and np.std(found) > 0
