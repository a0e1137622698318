"""A teacher of the same run is held beside the second stage: written once, in none of its checkpoints."""

import json

import numpy as np
import pytest

from data_pipelines.pairs.simulate import PairSpec, simulate_pairs
from histokd_jax.train import held, loop, run, signals
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.train.signals import Interrupted
from histokd_jax.types import Stage
from histokd_jax.utils import config

SETTINGS = {
    "train.max_epochs": "1",
    "report.bootstrap": "20",
    "compare.control": "False",
    "train.b": "8",
    "model.stem_patch": "4",
    "data.augment": "none",
}


class StopAfter(signals.StopRequest):
    """A request that arrives after a number of steps, without any signal."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


def test_only_declared_groups_that_are_not_trained_are_held():
    cfg = config.load("configs/hmkd.py:smoke")
    params, extra = {"teacher": 1, "student": 2}, {"teacher": 3, "student": 4}
    assert held.divide(cfg, Stage("teacher", ("teacher",), ()), params, extra)[:2] == (params, extra)
    own, state, aside = held.divide(cfg, Stage("student", ("student",), ()), params, extra)
    assert (own, state) == ({"student": 2}, {"student": 4})
    assert aside.frozen == {"teacher": {"params": 1, "batch_stats": 3}}
    assert aside.beside(own, state) == (params, extra)


def test_absent_held_networks_are_named(tmp_path):
    with pytest.raises(CheckpointMismatchError, match="no parameters 'teacher'"):
        held.read(tmp_path, ("teacher",), {"teacher": {}}, {"teacher": {}})


@pytest.mark.long
def test_a_run_resumed_in_its_second_stage_equals_one_that_was_not_interrupted(tmp_path, monkeypatch):
    simulate_pairs(tmp_path / "pairs", PairSpec(n_train=16, n_test=8, size=32, per_group=1))
    values = {**SETTINGS, "data.dir": str(tmp_path / "pairs")}
    cfg = config.load("configs/hmkd.py:smoke", [f"{key}={value}" for key, value in values.items()])
    written, save = [], loop.RunCheckpoints.save

    def spy(self, step, state, progress):
        written.append((progress["stage"], set(state.params), set(state.best_params), set(state.extra)))
        save(self, step, state, progress)

    monkeypatch.setattr(loop.RunCheckpoints, "save", spy)
    run.train(cfg, tmp_path / "whole")
    with monkeypatch.context() as patch:
        # Two steps per stage: stops in the second one.
        patch.setattr(run, "StopRequest", lambda: StopAfter(2))
        with pytest.raises(Interrupted):
            run.train(cfg, tmp_path / "halves")
    assert {entry[0] for entry in written} == {0, 1} and written[-1][0] == 1
    for stage, *groups in written:
        assert groups == [{"student"} if stage else {"student", "teacher"}] * 3
    assert {p.name for p in (tmp_path / "halves/fold_0/held").iterdir()} == {"teacher", "extra_teacher"}
    run.train(cfg, tmp_path / "halves")
    whole, halves = (
        np.genfromtxt(tmp_path / f"{n}/predictions_test.csv", str, delimiter=",") for n in ("whole", "halves")
    )
    np.testing.assert_array_equal(whole, halves)
    assert set(json.loads((tmp_path / "whole/summary.json").read_text())["modes"]) == {"he", "he+ihc"}
