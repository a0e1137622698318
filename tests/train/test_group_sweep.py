"""Sweeps over folds that choose gene groups of their own sizes: each width has its program, the table is the same."""

import csv
import json

import numpy as np
import pytest
from survival_tiny import SETTINGS, survival_dir

from data_pipelines.tables import read_gene_table
from histokd_jax.evals import ablation
from histokd_jax.evals.survival_predictions import read_survival_predictions
from histokd_jax.evals.survival_summary import MEASURE
from histokd_jax.train import run, sweep
from histokd_jax.train.signals import Interrupted, StopRequest
from histokd_jax.utils import config

__all__ = ["survival_dir"]

KEPT = ("data.", "train.", "split.", "early_stop.", "compare.", "ckpt.", "report.", "eval.", "survival.")
NARROW = {
    "model.dim": 8,
    "model.heads": 1,
    "model.head_dim": 4,
    "model.ffn_mult": 1,
    "model.tokens": 2,
    "train.b": 8,
    "train.max_epochs": 1,
    "split.val_fraction": 0.0,
    "genes.correction": "none",
    "genes.p": 0.5,
    "genes.empty_group": "keep_top_n",
    "genes.top_n": 1,
    "genes.suffixes": "('',)",
}


@pytest.fixture(scope="module")
def settings(survival_dir, tmp_path_factory):
    """The full method and its control, on both folds of the tiny cohort."""
    names = read_gene_table(survival_dir / "tables" / "genes.npz").names
    path = tmp_path_factory.mktemp("groups") / "signatures.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("first", "second"), *zip(names[:10], names[10:20])])
    values = {key: value for key, value in SETTINGS.items() if key.startswith(KEPT)}
    values |= {**NARROW, "data.dir": survival_dir, "genes.signatures": path, "fold": "all"}
    texts = [f"{key}={value}" for key, value in values.items()]
    return config.load_sweep("configs/ablations/ghanet.py:controls", texts, ["without_reconstruction"])[0]


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    """(finished sweep of one seed, members of every part that was trained as one program, the plan)."""
    path, parts = tmp_path_factory.mktemp("swept"), []
    plan, original = sweep.prepare(settings, "full", (0,)), sweep.fit_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sweep, "fit_group", lambda group, *a: parts.append([r.name for r in group]) or original(group, *a)
        )
        table = sweep.train(plan, path)
    return path, parts, plan, table


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The same trainings by `histokd train`."""
    root = tmp_path_factory.mktemp("alone")
    for name, cfg in settings.items():
        run.train(sweep._plain(cfg, 0), root / name / "seed_0")
    return root


def sizes(directory):
    return [json.loads((directory / f"fold_{k}" / "model" / "model.json").read_text())["spec"] for k in (0, 1)]


def test_folds_of_other_widths_have_programs_of_their_own_shared_by_settings(settings):
    """Without compiling anything: one group of settings, one `Programs` for every choice of sizes."""
    plan = sweep.prepare(settings, "full", (0, 1))
    assert len(plan.groups) == 1 and "one program for every choice of sizes" in plan.describe()
    trainer = sweep._Trainer(plan, plan.groups[0], None, (), StopRequest(), 0, "")
    found = {}
    for member in plan.members(plan.groups[0]):
        data = trainer._plan(trainer._experiment(member.setting, member.seed), member.fold)
        found.setdefault(member.fold, set()).add(id(trainer.widths.programs(data)))
    assert all(len(programs) == 1 for programs in found.values()) and found[0] != found[1]


@pytest.mark.slow
def test_folds_of_other_widths_are_trained_by_programs_of_their_own(swept):
    path, parts, _, _ = swept
    groups = [spec["gene_groups"] for spec in sizes(path / "full" / "seed_0")]
    assert groups[0] != groups[1], "the folds must choose groups of other sizes for this check"
    # The weight of the reconstruction is data: both settings share the program of a fold.
    assert sorted(sorted(part) for part in parts) == [
        [f"{name}, seed 0, fold {k}" for name in ("full", "without_reconstruction")] for k in (0, 1)
    ]
    assert not list((path / "groups").iterdir())


@pytest.mark.slow
def test_predictions_equal_those_of_single_runs(swept, alone):
    path = swept[0]
    for name in ("full", "without_reconstruction"):
        mine, other = (read_survival_predictions(p / name / "seed_0" / "predictions_test.csv") for p in (path, alone))
        assert mine.case_id.tolist() == other.case_id.tolist() and len(mine) == 48
        np.testing.assert_allclose(mine.risk, other.risk, atol=2e-5)
    assert sizes(path / "full" / "seed_0") == sizes(alone / "full" / "seed_0")


@pytest.mark.slow
def test_the_table_is_that_of_single_runs(swept, alone):
    table, options = swept[3], {"bootstrap": 40, "seed": swept[2].experiments["full"].cfg.seed}
    runs = {
        name: {
            (0, k): read_survival_predictions(alone / name / "seed_0" / f"fold_{k}" / "predictions_test.csv")
            for k in (0, 1)
        }
        for name in ("full", "without_reconstruction")
    }
    want = ablation.ablation_table(runs, "full", measure=MEASURE, **options)
    assert len(table["rows"]) == len(want["rows"]) == 2
    for ours, theirs in zip(table["rows"], want["rows"]):
        assert {k: ours[k] for k in ("setting", "pairs", "seeds")} == {
            k: theirs[k] for k in ("setting", "pairs", "seeds")
        }
        np.testing.assert_allclose([ours["mean"], *ours["ci"]], [theirs["mean"], *theirs["ci"]], atol=0.01)


class StopAfter(StopRequest):
    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


@pytest.mark.slow
def test_a_sweep_interrupted_in_its_second_part_continues_bit_for_bit(settings, swept, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "StopRequest", lambda: StopAfter(4))
        with pytest.raises(Interrupted):
            sweep.train(sweep.prepare(settings, "full", (0,)), tmp_path)
    assert len(list(tmp_path.glob("*/seed_0/fold_*/fold.json"))) == 2
    sweep.train(sweep.prepare(settings, "full", (0,)), tmp_path)
    for name in ("full", "without_reconstruction"):
        file = f"{name}/seed_0/predictions_test.csv"
        assert (tmp_path / file).read_bytes() == (swept[0] / file).read_bytes()
    assert (tmp_path / "table.csv").read_bytes() == (swept[0] / "table.csv").read_bytes()


def test_a_fold_without_features_is_named_before_anything_is_trained(settings):
    """An empty group is an error as published: found in `prepare`, whatever the fold."""
    bad = config.ConfigDict(settings["full"].to_dict())
    bad.genes.update({"p": 1e-9, "empty_group": "error"})
    with pytest.raises(ValueError, match="setting full: .*group"):
        sweep.prepare({"full": bad.lock()}, "full", (0,))
