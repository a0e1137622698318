"""A tiny simulated survival cohort and a tiny ABMIL configuration: fixtures of the survival tests that train."""

import csv

import numpy as np
import pytest

from data_pipelines.manifest import Manifest
from data_pipelines.reader import BagReader
from data_pipelines.simulate import SimulationSpec, simulate_cohort
from data_pipelines.writer import DatasetWriter
from histokd_jax.utils import config

SPEC = SimulationSpec(
    n_cases=48, feat_dim=12, n_genes=24, bag_median=24.0, bag_min=6, signal_genes=8, seed=4, hazard_log_ratio=2.0
)
CONFIG = """
from ml_collections import ConfigDict

from . import common


def get_config(arg=""):
    from histokd_jax.methods.supervised.config import default_config

    cfg = common.base()
    own = default_config().to_dict()
    for section in ("data", "train", "infer"):
        cfg[section].update(own.pop(section))
    cfg.update(ConfigDict(own))
    cfg.method, cfg.task, cfg.task_kind = "supervised", "OS", "survival"
    cfg.genes = dict(kind="none", exclude=(), nan_policy="error", clip=common.placeholder(float))
    cfg.infer.mode = "pathology"
    return cfg
"""
SETTINGS = {
    "fold": "0",
    "data.feat_dim": "0",
    "data.chunk": "32",
    "data.row_multiple": "32",
    "data.slide_choice": "all",
    "model.abmil.width": "8",
    "model.abmil.attn": "4",
    "model.abmil.rho": "8",
    "train.b": "4",
    "train.max_epochs": "2",
    "train.lr": "0.002",
    "split.n_folds": "2",
    "split.val_fraction": "0.25",
    "early_stop.enabled": "False",
    "compare.control": "False",
    "ckpt.every_epochs": "1",
    "report.bootstrap": "40",
    "eval.slots": "8",
    "survival.n_bins": "3",
}


def write_two_slide_cohort(source, target):
    """The cohort of `source` with every third case's bag cut into two slides; tables are copied."""
    manifest, reader = Manifest.load(source), BagReader(source)
    with DatasetWriter(
        target, name="two_slides", feat_dim=manifest.feat_dim, dtype=manifest.dtype, simulated=True, simulation={}
    ) as writer:
        for row, slide in enumerate(manifest.slides):
            bag = np.empty((slide.n_patches, manifest.feat_dim), manifest.dtype)
            coords = np.empty((slide.n_patches, 2), np.int32)
            reader.read_into(row, 0, slide.n_patches, bag, coords)
            cut = slide.n_patches // 2 if row % 3 == 0 else slide.n_patches
            for number, part in enumerate((slice(0, cut), slice(cut, None))):
                if len(bag[part]):
                    writer.add(f"{slide.case_id}-{number}", slide.case_id, bag[part], coords[part])
    tables = target / "tables"
    tables.mkdir()
    for name in ("survival.csv", "genes.npz", "labels.csv"):
        (tables / name).write_bytes((source / "tables" / name).read_bytes())
    return target


@pytest.fixture(scope="session")
def survival_dir(tmp_path_factory):
    """A simulated data set of 48 cases with follow-up, every third with two slides; read only."""
    root = tmp_path_factory.mktemp("survival")
    simulate_cohort(root / "sim", SPEC)
    return write_two_slide_cohort(root / "sim", root / "two")


@pytest.fixture(scope="session")
def survival_config_file(tmp_path_factory):
    """A configuration file of supervised survival models."""
    path = tmp_path_factory.mktemp("config") / "survival_tiny.py"
    path.write_text(CONFIG)
    return path


def overrides(data, **changes):
    """`key=value` settings; `train__b=2` replaces train.b."""
    values = {**SETTINGS, "data.dir": str(data), **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture
def survival_config(survival_dir, survival_config_file):
    """changes -> resolved configuration of a tiny survival run."""
    return lambda **changes: config.load(str(survival_config_file), overrides(survival_dir, **changes))


def read_csv(path):
    """Rows of a CSV file as dictionaries."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
