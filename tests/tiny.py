"""A tiny simulated cohort and a tiny MKD configuration: fixtures of every test that trains."""

import pytest

from data_pipelines.simulate import SimulationSpec, simulate_cohort
from histokd_jax.utils import config

CONFIG = "configs/mkd.py:er,fold=0"
SPEC = SimulationSpec(n_cases=40, feat_dim=12, n_genes=64, bag_median=24.0, bag_min=4, signal_genes=16, seed=1)
SETTINGS = {
    "model.d": "8",
    "model.attn": "4",
    "data.chunk": "32",
    "data.row_multiple": "32",
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


def overrides(data, **changes):
    """`key=value` settings of a tiny run on a data set; `train__b=2` replaces train.b."""
    values = {**SETTINGS, "data.dir": str(data), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


def train_arguments(data, workdir, *flags, **changes):
    """Arguments of a tiny `histokd train`."""
    settings = [f"--config.{text}" for text in overrides(data, **changes)]
    return ["train", "--config", CONFIG, "--workdir", str(workdir), *flags, *settings]


@pytest.fixture(scope="session")
def cohort_dir(tmp_path_factory):
    """A simulated data set of 40 cases; read only."""
    path = tmp_path_factory.mktemp("cohort") / "sim"
    simulate_cohort(path, SPEC)
    return path


def config_maker(data):
    """changes -> resolved configuration of a tiny run on a data set."""
    return lambda **changes: config.load(CONFIG, overrides(data, **changes))


@pytest.fixture
def tiny_config(cohort_dir):
    """changes -> resolved configuration of a tiny run."""
    return config_maker(cohort_dir)
