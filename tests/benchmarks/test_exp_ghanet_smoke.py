"""`exp_ghanet`: what the simulated bags are told about survival."""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import exp_ghanet as exp  # noqa: E402
from histokd_jax.methods import registry  # noqa: E402
from histokd_jax.utils import config  # noqa: E402


def test_bags_know_early_from_late_and_nothing_of_early_censored_patients():
    time = np.array([1.0, 2.0, 3.0, 4.0, 1.5, 9.0])
    event = np.array([True, True, True, True, False, False])
    assert exp.early_death(time, event) == ["1", "1", "0", "0", "", "0"]


def test_arms_differ_in_the_reconstruction_only():
    cfgs = {}
    for arm, (spec, extra) in exp.ARMS.items():
        cfgs[arm] = config.load(spec, [*exp.TRAINING, *extra])
        registry.method_module(cfgs[arm].method).validate(cfgs[arm])
        assert cfgs[arm].infer.mode == exp.MODE and not cfgs[arm].early_stop.enabled
    full, control = (config.flatten(cfgs[arm]) for arm in ("ghanet", "ghanet_no_reconstruction"))
    assert {key for key in full if full[key] != control[key]} == {"loss.rec_weight"}
