"""Runs and sweeps with Lookahead around RAdam and a rate that changes per step."""

import json

import numpy as np
import pytest
import survival_tiny
from survival_tiny import survival_config, survival_config_file, survival_dir

from histokd_jax.evals.survival_predictions import read_survival_predictions
from histokd_jax.train import run, signals, sweep
from histokd_jax.train.signals import Interrupted
from histokd_jax.utils import config

__all__ = ["survival_config", "survival_config_file", "survival_dir"]

# Two epochs of six steps: the slow weights move at the end of both.
RECIPE = dict(
    train__optimizer="lookahead_radam", train__lr_schedule="warmup_cosine", train__max_epochs=2, split__val_fraction=0.0
)


class StopAfter(signals.StopRequest):
    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


@pytest.fixture(scope="module")
def trained(survival_dir, survival_config_file, tmp_path_factory):
    """A finished run of one fold; read only."""
    path = tmp_path_factory.mktemp("lookahead") / "run"
    run.train(config.load(str(survival_config_file), survival_tiny.overrides(survival_dir, **RECIPE)), path)
    return path


def test_rates_are_logged_step_by_step(trained):
    lines = [json.loads(line) for line in (trained / "fold_0" / "metrics.jsonl").read_text().splitlines()]
    steps = 24 // 4
    ends = [0.002 * (steps - 1) / steps, 0.001 * (1 + np.cos(np.pi * (steps - 1) / steps))]
    assert [line["lr"] for line in lines if line["split"] == "train"] == pytest.approx(ends)


def test_an_interrupted_run_continues_bit_for_bit(survival_config, trained, tmp_path, monkeypatch):
    """Stopped between two moves of the slow weights, in the middle of an epoch."""
    cfg = survival_config(**RECIPE)
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", lambda: StopAfter(7))
        with pytest.raises(Interrupted):
            run.train(cfg, tmp_path)
    run.train(cfg, tmp_path)
    name = "predictions_test.csv"
    assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.parametrize("loop", ["map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_replicas_equal_single_runs(survival_config, trained, tmp_path, loop):
    settings = {
        "full": survival_config(**RECIPE, train__replica_loop=loop),
        "slower": survival_config(**RECIPE, train__replica_loop=loop, train__lr=0.001),
    }
    plan = sweep.prepare(settings, "full", (0,))
    assert len(plan.groups) == 1
    sweep.train(plan, tmp_path)
    ours = read_survival_predictions(tmp_path / "full" / "seed_0" / "predictions_test.csv")
    alone = read_survival_predictions(trained / "predictions_test.csv")
    np.testing.assert_allclose(ours.risk, alone.risk, atol=2e-5)
    other = read_survival_predictions(tmp_path / "slower" / "seed_0" / "predictions_test.csv")
    assert np.abs(other.risk - alone.risk).max() > 1e-4
