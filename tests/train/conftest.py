"""A tiny simulated cohort and a tiny MKD configuration, shared by all trainer tests."""

import sys

import pytest

from data_pipelines.simulate import SimulationSpec, simulate_cohort
from histokd_jax.utils import config

TINY = {
    "model.d": "8",
    "model.attn": "4",
    "data.chunk": "32",
    "genes.top_k": "32",
    "genes.token_size": "16",
    "train.b": "4",
    "train.max_epochs": "3",
    "split.n_folds": "2",
    "early_stop.enabled": "False",
    "compare.control": "False",
    "ckpt.every_epochs": "1",
    "report.bootstrap": "50",
    "eval.slots": "8",
    "data.feat_dim": "0",
}


@pytest.fixture(scope="session")
def cohort_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("cohort") / "sim"
    spec = SimulationSpec(n_cases=40, feat_dim=12, n_genes=64, bag_median=24.0, bag_min=4, signal_genes=16, seed=1)
    simulate_cohort(path, spec)
    return path


@pytest.fixture
def tiny_config(cohort_dir):
    def make(**changes):
        values = {**TINY, "data.dir": str(cohort_dir), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
        return config.load("configs/mkd.py:er,fold=0", [f"{k}={v}" for k, v in values.items()])

    return make


@pytest.fixture
def tiny_command(cohort_dir):
    """The command line of a tiny run in a process of its own."""

    def make(workdir, **changes):
        values = {**TINY, "data.dir": str(cohort_dir), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
        command = [sys.executable, "-m", "histokd_jax.cli.main", "train", "--config", "configs/mkd.py:er,fold=0"]
        return [*command, "--workdir", str(workdir), *(f"--config.{k}={v}" for k, v in values.items())]

    return make
