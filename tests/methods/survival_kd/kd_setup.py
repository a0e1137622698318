"""Small pairs of networks and batches shared by the tests of survival distillation."""

import importlib.util
import pathlib

import numpy as np

from histokd_jax.methods.survival_kd.config import default_config
from histokd_jax.methods.survival_kd.method import make_method
from histokd_jax.types import DataSpec

# The batches of the supervised tests, without making their folder importable.
_PATH = pathlib.Path(__file__).parents[1] / "supervised" / "supervised_setup.py"
_SPEC = importlib.util.spec_from_file_location("supervised_setup_of_kd", _PATH)
small = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(small)

GROUPS = (3, 1, 6)
NARROW = {
    **small.NARROW,
    "transmil": {"width": 8, "heads": 2, "landmarks": 4, "tile": 8},
    "mcat": {"width": 16},
    "porpoise_mmf": {"width": 16, "patch_width": 8, "attn": 5},
    "survpath": {"width": 16, "attn": 8, "hidden": 5},
}
DATA = DataSpec(small.FEAT, small.CLASSES, small.GENES, "survival", GROUPS)


def config(teacher="snn", student="abmil", **overrides):
    """Default config with narrow networks; `overrides` are dotted keys with `__` for the dot."""
    cfg = default_config()
    flat = {"data.feat_dim": small.FEAT, "data.chunk": 8, "train.b": 4}
    flat |= {"teacher.name": teacher, "student.name": student}
    flat |= {
        f"{role}.{network}.{key}": value
        for role in ("teacher", "student")
        for network, options in NARROW.items()
        for key, value in options.items()
    }
    cfg.update_from_flattened_dict(flat)
    cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in overrides.items()})
    return cfg


def method(teacher="snn", student="abmil", **overrides):
    return make_method(config(teacher, student, **overrides), DATA)


def batch(lacking=()):
    """Four slides; those in `lacking` have no genes."""
    found = small.batch()
    has = np.isin(np.arange(len(small.SIZES)), lacking, invert=True)
    return {**found, "has_genes": has, "genes": np.where(has[:, None], found["genes"], np.nan).astype(np.float32)}
