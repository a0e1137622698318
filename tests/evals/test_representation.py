"""Tables, summaries and findings of label-free runs."""

import numpy as np
import pytest

from histokd_jax.evals import ablation, collapse
from histokd_jax.evals import representation_summary as summaries
from histokd_jax.evals.predictions import PredictionsError
from histokd_jax.evals.representation_predictions import concatenate, make_rows, read_rows, write_rows


def rows(n=10, fold=0, shift=0.0, seed=0):
    loss = np.random.default_rng(seed).normal(5.0, 1.0, n) + shift
    together = np.where(np.arange(n) < n // 4 * 4, 4, n % 4)
    return make_rows([f"g{i // 2}" for i in range(n)], [f"x{i}" for i in range(n)], fold, "views", loss, together)


def test_a_table_is_read_back_with_all_digits(tmp_path):
    table = concatenate([rows(), rows(fold=1, seed=1)])
    again = read_rows(write_rows(tmp_path / "t.csv", table))
    np.testing.assert_array_equal(again.loss, table.loss)
    assert again.folds == (0, 1) and len(rows().full_steps()) == 8


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("case_id,loss\n", "the columns are"),
        ("case_id,slide_id,fold,mode,loss,together\n", "no rows below the header"),
        ("case_id,slide_id,fold,mode,loss,together\na,b,0,views,nan,4\n", "row 2: loss is NaN"),
        ("case_id,slide_id,fold,mode,loss,together\na,b,0,views,x,4\n", "row 2, column loss"),
        ("case_id,slide_id,fold,mode,loss,together\na,b,0,views,1,4\na,b,0,views,1,4\n", "two rows for"),
    ],
)
def test_what_breaks_the_schema_is_named(tmp_path, text, match):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(PredictionsError, match=match):
        read_rows(tmp_path / "t.csv")


def test_the_summary_averages_full_steps_over_folds():
    table = concatenate([rows(), rows(fold=1, seed=1)])
    found = summaries.summarise(table, bootstrap=400, facts={"task_kind": "representation"})
    row = found["modes"]["views"]["metrics"]["loss"]
    expected = [rows().loss[:8].mean(), rows(seed=1).loss[:8].mean()]
    np.testing.assert_allclose(row["per_fold"], expected)
    assert row["mean"] == pytest.approx(np.mean(expected)) and row["std"] == pytest.approx(np.std(expected))
    assert row["ci"][0] < row["mean"] < row["ci"][1] and found["modes"]["views"]["n_left_out"] == 4
    assert "Joint-embedding loss" in summaries.print_table(found)
    none = summaries.summarise(table, bootstrap=0)["modes"]["views"]["metrics"]["loss"]
    assert none["ci"] == [None, None] and none["reason"]
    with pytest.raises(ValueError, match="redefine"):
        summaries.summarise(table, bootstrap=0, facts={"folds": 1})


def test_a_sweep_compares_losses_of_the_same_examples():
    runs = {name: {(s, 0): rows(shift=d, seed=s) for s in (0, 1)} for name, d in (("a", 0.0), ("b", -1.0))}
    table = ablation.ablation_table(runs, "a", bootstrap=50, measure=summaries.MEASURE)
    row = next(r for r in table["rows"] if r["setting"] == "b")
    assert row["difference"] == pytest.approx(-1.0) and row["metric"] == "loss"


def test_findings_name_the_branch_and_give_the_evidence():
    healthy = {"std_unit_0": 0.9, "effective_rank_0": 12.0, "dead_dims_0": 0.0, "spread_image": 80.0, "loss": 3.0}
    assert collapse.signs(healthy) == {}
    found = collapse.signs({**healthy, "std_unit_1": 0.01, "dead_dims_1": 0.9, "spread_partner": 0.0})
    assert set(found) == {"collapsed_1", "constant_partner"}
    assert "0.01" in found["collapsed_1"] and "90 %" in found["collapsed_1"] and "BRANCH 1" in found["collapsed_1"]
    assert set(collapse.signs({**healthy, "effective_rank_0": 1.1})) == {"collapsed_0"}
