"""Prediction tables of survival tasks, their summary and the table of a sweep."""

import numpy as np
import pytest

from histokd_jax.evals import ablation
from histokd_jax.evals import survival_predictions as P
from histokd_jax.evals import survival_summary as S
from histokd_jax.evals.predictions import PredictionsError
from histokd_jax.evals.survival_measures import Reference, mean_nll


def table(n=40, folds=2, noise=0.5, seed=0, bins=3, unknown=False):
    z = np.random.default_rng(5).normal(size=n)
    time = np.random.default_rng(6).exponential(30 * np.exp(-z)) + 0.1
    event = (np.random.default_rng(7).random(n) < 0.6).astype(int)
    risk = z + noise * np.random.default_rng(seed).normal(size=n)
    hazards = 1 / (1 + np.exp(-risk[:, None] + np.zeros(bins)))
    follow_up = (np.full(n, np.nan), np.full(n, -1), np.full(n, -1)) if unknown else (time, event, np.zeros(n, int))
    case = [f"c{i}" for i in range(n)]
    return P.make_survival_predictions(
        case, [f"{c}-1;{c}-2" for c in case], np.arange(n) % folds, "pathology", *follow_up, risk, hazards
    )


def references(rows):
    return {k: Reference(rows.time_months, rows.event == 1, (0.0, 10.0, 40.0, 500.0)) for k in rows.folds}


@pytest.mark.parametrize("bins", [0, 3])
@pytest.mark.parametrize("unknown", [False, True])
def test_written_tables_are_read_back_exactly(tmp_path, bins, unknown):
    rows = table(bins=bins, unknown=unknown)
    again = P.read_survival_predictions(P.write_survival_predictions(tmp_path / "p.csv", rows))
    for name in rows.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(again, name), getattr(rows, name), err_msg=name)


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        ("risk", "nan", "row 2: risk is NaN"),
        ("risk", "high", "row 2, column risk: 'high' is not float"),
        ("hazard_1", "1.5", r"row 2: hazard outside \[0, 1\]"),
        ("event", "2", "row 2: event is not 0 or 1"),
        ("time_months", "-3", "row 2: follow-up is no time"),
        ("event", "", "row 2: a time without an event status"),
        ("bin", "7", r"row 2: bin outside \[0, 3\)"),
        ("case_id", "c1", "both predict"),
    ],
)
def test_bad_cells_are_named(tmp_path, column, text, message):
    path = P.write_survival_predictions(tmp_path / "p.csv", table(folds=1).where(np.arange(2)))
    header, first, second = path.read_text().splitlines()
    cells = dict(zip(header.split(","), first.split(",")))
    cells[column] = text
    if column == "case_id":
        cells |= {"slide_id": "c1-1;c1-2"}
    path.write_text("\n".join([header, ",".join(cells.values()), second]) + "\n")
    with pytest.raises(PredictionsError, match=message):
        P.read_survival_predictions(path)


def test_a_classification_table_is_refused(tmp_path):
    (tmp_path / "p.csv").write_text("case_id,slide_id,fold,mode,label,prob\na,b,0,pathology,1,0.5\n")
    with pytest.raises(PredictionsError, match="hazard_0"):
        P.read_survival_predictions(tmp_path / "p.csv")


def test_worked_example_of_the_likelihood():
    """G-HANet section 5: hazards (.1, .2, .3, .4)."""
    hazards = np.array([[0.1, 0.2, 0.3, 0.4]])
    for place, event, expected in (
        (2, True, 1.532477),
        (2, False, 0.685179),
        (0, True, 2.302585),
        (3, False, 1.196005),
    ):
        assert mean_nll(hazards, np.array([place]), np.array([event])) == pytest.approx(expected, abs=1e-6)


def test_summary_and_comparison(tmp_path):
    good, bad = table(noise=0.2), table(noise=3.0, seed=1)
    found = S.summarise(good, references(good), bootstrap=200)
    row = found["modes"]["pathology"]["metrics"]["c_index"]
    assert row["mean"] == pytest.approx(np.mean(row["per_fold"])) and row["std"] == pytest.approx(
        np.std(row["per_fold"])
    )
    assert row["ci"][0] < row["mean"] < row["ci"][1]
    against = S.compare(good, bad, bootstrap=200)["modes"]["pathology"]["metrics"]["c_index"]
    assert against["difference"] > 0 and against["ci"][0] < against["difference"] < against["ci"][1]
    same = S.compare(good, good, bootstrap=50)["modes"]["pathology"]["metrics"]["c_index"]
    assert same["difference"] == 0 and same["verdict"].endswith("no gain shown")
    with pytest.raises(ValueError, match="no follow-up"):
        S.summarise(table(unknown=True), references(good))
    with pytest.raises(ValueError, match=r"folds \[1\]"):
        S.summarise(good, {0: references(good)[0]})
    with pytest.raises(ValueError, match="one arm only"):
        S.compare(good, bad.where(np.arange(30)))


def test_sweep_table_compares_c_indices(tmp_path):
    runs = {
        name: {(s, k): table(noise=noise, seed=s).where(np.arange(40) % 2 == k) for s in (0, 1) for k in (0, 1)}
        for name, noise in (("full", 0.3), ("less", 3.0))
    }
    found = ablation.ablation_table(runs, "full", bootstrap=100, measure=S.MEASURE)
    assert {row["metric"] for row in found["rows"]} == {"c_index"}
    assert found["rows"][1]["difference"] < 0 and found["rows"][1]["pairs"] == 4
    ablation.write_table(tmp_path, found, {}, S.MEASURE.labels)
    assert "C-index (Harrell)" in (tmp_path / "table.md").read_text()
