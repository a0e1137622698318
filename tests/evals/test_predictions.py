"""Prediction tables: lossless round trip, atomic writing, and every way a file can be wrong."""

import numpy as np
import pytest

from data_pipelines.errors import StorageError
from histokd_jax.evals import predictions as P


def table(num_classes=2, n=6):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(num_classes), n)
    return P.make_predictions(
        [f"case{i}" for i in range(n)], [f"slide{i}" for i in range(n)], 1, "pathology", np.arange(n) % 2, probs
    )


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_round_trip_is_lossless(tmp_path, num_classes):
    written = table(num_classes)
    read = P.read_predictions(P.write_predictions(tmp_path / "p.csv", written))
    for name in ("case_id", "slide_id", "fold", "mode", "label"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    np.testing.assert_array_equal(read.probs[:, 1], written.probs[:, 1])
    np.testing.assert_allclose(read.probs, written.probs, rtol=0, atol=1e-16)


def test_header_is_the_documented_schema(tmp_path):
    P.write_predictions(tmp_path / "p.csv", table())
    P.write_predictions(tmp_path / "q.csv", table(3))
    assert (tmp_path / "p.csv").read_text().splitlines()[0] == "case_id,slide_id,fold,mode,label,prob"
    lines = (tmp_path / "q.csv").read_text().splitlines()
    assert lines[0] == "case_id,slide_id,fold,mode,label,prob,prob_0,prob_1,prob_2"
    prob, *each = map(float, lines[1].split(",")[5:])
    assert prob == max(each)


def test_unlabelled_rows_are_blank_in_the_file(tmp_path):
    t = P.make_predictions(["a"], ["s"], 0, "pathology", [-1], [[0.25, 0.75]])
    path = P.write_predictions(tmp_path / "p.csv", t)
    assert path.read_text().splitlines()[1] == "a,s,0,pathology,,0.75"
    assert P.read_predictions(path).label.tolist() == [-1]


GOOD = "case_id,slide_id,fold,mode,label,prob\na,s1,0,pathology,0,0.5\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("label,", ""), r"missing column\(s\) \['label'\]"),
        (GOOD.replace("prob\n", "prob,seed\n").replace("0.5\n", "0.5,1\n"), r"unexpected column\(s\) \['seed'\]"),
        (GOOD.replace("prob\n", "prob,arm\n").replace("0.5\n", "0.5,x\n"), r"unexpected column\(s\) \['arm'\]"),
        (GOOD + "b,s2,0,pathology,1,nan\n", "row 3, column prob: 'nan'"),
        (GOOD + "b,s2,0,pathology,1,1.5\n", r"row 3, column prob: '1.5'; a finite value in \[0, 1\]"),
        (GOOD + "b,s2,0,pathology,1,high\n", "row 3, column prob: 'high' is not float"),
        (GOOD + "b,s2,zero,pathology,1,0.5\n", "row 3, column fold: 'zero' is not int"),
        (GOOD + "b,s2,0,pathology,2,0.5\n", r"row 3: label outside \[0, 2\) \(case 'b'"),
        (GOOD + "a,s1,0,pathology,0,0.7\n", r"rows 2 and 3 both predict .*\('a', 's1', 0, 'pathology'\)"),
        (GOOD + "b,s2,0\n", "row 3 has 3 fields, the header has 6"),
        (GOOD + ",s2,0,pathology,0,0.7\n", "row 3: case_id is empty"),
        (GOOD.splitlines()[0] + "\n", "no rows below the header"),
    ],
)
def test_bad_files_are_refused_naming_file_row_and_field(tmp_path, text, message):
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(P.PredictionsError, match=message) as error:
        P.read_predictions(path)
    assert str(path) in str(error.value)


def test_multiclass_probabilities_must_sum_to_one(tmp_path):
    path = tmp_path / "p.csv"
    head = "case_id,slide_id,fold,mode,label,prob,prob_0,prob_1,prob_2\n"
    path.write_text(head + "a,s,0,pathology,0,0.9,0.9,0.9,0.1\n")
    with pytest.raises(P.PredictionsError, match="row 2: probabilities do not sum to 1"):
        P.read_predictions(path)


def test_nan_probability_is_refused_before_writing():
    with pytest.raises(P.PredictionsError, match="row 1: probability is NaN or infinite"):
        P.make_predictions(["a", "b"], ["s", "t"], 0, "m", [0, 1], [[0.5, 0.5], [np.nan, 0.5]])


def test_a_writer_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("old")
    with pytest.raises(KeyError), P.atomic_writer(path) as stream:
        stream.write("half")
        raise KeyError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["p.csv"]


def test_concatenate_refuses_duplicates_and_mixed_classes():
    with pytest.raises(P.PredictionsError, match="both predict"):
        P.concatenate([table(), table()])
    with pytest.raises(P.PredictionsError, match=r"\[2, 3\] classes"):
        P.concatenate([table(), table(3)])


def test_a_folder_that_does_not_exist_is_a_storage_error_naming_the_target(tmp_path):
    with pytest.raises(StorageError, match="p.csv failed"):
        P.write_predictions(tmp_path / "nowhere" / "p.csv", table())
