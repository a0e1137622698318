"""Summaries: fold means and population std, intervals, paired comparison, JSON with reasons for what is undefined."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from histokd_jax.evals import bootstrap as bs
from histokd_jax.evals import predictions as P
from histokd_jax.evals import summary as S


def table(strength=1.0, seed=0, n=60, modes=("pathology",), folds=3):
    rng = np.random.default_rng(seed)
    y = np.random.default_rng(99).integers(0, 2, n)
    parts = []
    for mode in modes:
        p = 1 / (1 + np.exp(-(strength * (y - 0.5) + rng.normal(size=n))))
        probs = np.stack([1 - p, p], axis=1)
        parts.append(
            P.make_predictions(*([f"{k}{i}" for i in range(n)] for k in "cs"), np.arange(n) % folds, mode, y, probs)
        )
    return P.concatenate(parts)


def test_mkd_section8_mean_and_population_std_over_folds():
    t = table()
    row = S.summarise(t, num_classes=2, bootstrap=50)["modes"]["pathology"]["metrics"]["auroc"]
    want = [roc_auc_score(t.label[t.fold == k], t.probs[t.fold == k, 1]) for k in range(3)]
    np.testing.assert_allclose(row["per_fold"], want)
    np.testing.assert_allclose([row["mean"], row["std"]], [np.mean(want), np.std(want, ddof=0)])
    assert row["ci"][0] < row["mean"] < row["ci"][1] and row["reason"] is None


def test_interval_is_that_of_the_fold_mean_bootstrap():
    t = table()
    row = S.summarise(t, num_classes=2, bootstrap=100, seed=4)["modes"]["pathology"]["metrics"]["auroc"]
    drawn = bs.draw_resamples(t.case_id, t.fold, t.label, resamples=100, seed=4)
    samples = bs.bootstrap_fold_means(t.label, t.probs, t.fold, drawn.weights)["auroc"]
    np.testing.assert_allclose(row["ci"], np.quantile(samples, [0.025, 0.975]))


def test_single_class_fold_becomes_null_with_a_reason_in_the_json(tmp_path):
    t = table(n=30)
    label = np.where(t.fold == 1, 0, t.label)
    t = P.make_predictions(t.case_id, t.slide_id, t.fold, t.mode, label, t.probs)
    path = S.write_summary(tmp_path / "summary.json", S.summarise(t, num_classes=2, bootstrap=50))
    row = json.loads(path.read_text())["modes"]["pathology"]["metrics"]["auroc"]
    assert row["per_fold"][1] is None and row["n_folds"] == 2
    assert row["reason"] == "fold 1: only class 0 occurs (10 rows)"
    np.testing.assert_allclose(row["mean"], np.mean([row["per_fold"][0], row["per_fold"][2]]))
    assert row["ci"][0] < row["ci"][1]


def test_zero_resamples_leave_the_interval_null():
    row = S.summarise(table(), num_classes=2, bootstrap=0)["modes"]["pathology"]["metrics"]["auroc"]
    assert row["ci"] == [None, None] and row["reason"] == "no resamples"


def test_summary_is_deterministic_and_takes_facts():
    a, b = (S.summarise(table(), num_classes=2, bootstrap=50, facts={"simulated": True}) for _ in range(2))
    assert a == b and a["simulated"] is True
    with pytest.raises(ValueError, match=r"\['folds'\]"):
        S.summarise(table(), num_classes=2, bootstrap=1, facts={"folds": 1})


def test_unlabelled_rows_and_wrong_class_count_are_refused():
    t = P.make_predictions(["a", "b"], ["s", "t"], 0, "m", [-1, 1], [[0.5, 0.5]] * 2)
    with pytest.raises(ValueError, match="case 'a' .* has no label"):
        S.summarise(t, num_classes=2)
    with pytest.raises(ValueError, match="2 classes, expected 3"):
        S.summarise(table(), num_classes=3)


def test_paired_difference_of_a_model_with_itself_is_zero_and_shows_no_gain():
    row = S.compare(table(), table(), bootstrap=50)["modes"]["pathology"]["metrics"]["auroc"]
    assert row["difference"] == 0.0 and row["ci"] == [0.0, 0.0]
    assert row["verdict"] == "the interval includes zero: no gain shown"


def test_paired_difference_uses_the_same_patients_whatever_the_row_order():
    a, b = table(3.0), table(0.5, seed=1)
    shuffled = b.where(np.random.default_rng(0).permutation(len(b)))
    got, again = (S.compare(a, x, bootstrap=100)["modes"]["pathology"]["metrics"]["auroc"] for x in (b, shuffled))
    assert got == again
    first, second = (
        S.summarise(x, num_classes=2, bootstrap=1)["modes"]["pathology"]["metrics"]["auroc"] for x in (a, b)
    )
    np.testing.assert_allclose(got["difference"], first["mean"] - second["mean"])
    assert got["ci"][0] > 0 and got["verdict"] == "the interval excludes zero: a gain" and got["folds_t"]["n"] == 3


def test_pairing_narrows_the_interval():
    """Two models whose errors are shared differ by less than two independent intervals would suggest."""
    a = table(1.5)
    noisy = np.clip(a.probs[:, 1] + 0.02 * np.random.default_rng(0).normal(size=len(a)), 0, 1)
    b = P.make_predictions(a.case_id, a.slide_id, a.fold, a.mode, a.label, np.stack([1 - noisy, noisy], axis=1))
    single = S.summarise(a, num_classes=2, bootstrap=300)["modes"]["pathology"]["metrics"]["auroc"]["ci"]
    paired = S.compare(a, b, bootstrap=300)["modes"]["pathology"]["metrics"]["auroc"]["ci"]
    assert paired[1] - paired[0] < 0.5 * (single[1] - single[0])


def test_unpaired_arms_are_refused():
    a = table()
    with pytest.raises(ValueError, match="2 rows .* occur in one arm only"):
        moved = np.where(np.arange(len(a)) == 0, 2, a.fold)
        S.compare(a, P.make_predictions(a.case_id, a.slide_id, moved, a.mode, a.label, a.probs))
    with pytest.raises(ValueError, match="share no mode"):
        S.compare(a, table(modes=("genomics",)))


@pytest.mark.parametrize(
    ("args", "lower", "words"),
    [
        ((0.1, 0.05, 0.2), False, "a gain"),
        ((-0.1, -0.2, -0.05), False, "a loss"),
        ((-0.1, -0.2, -0.05), True, "a gain"),
        ((0.1, -0.05, 0.2), False, "no gain shown"),
        ((0.1, np.nan, np.nan), False, "nothing can be concluded"),
    ],
)
def test_verdict_in_plain_words(args, lower, words):
    assert S.verdict(*args, lower_is_better=lower).endswith(words)


def test_print_table_lists_every_mode_and_marks_simulated_bags():
    t = table(modes=("pathology", "both"))
    text = S.print_table(S.summarise(t, num_classes=2, bootstrap=20, facts={"simulated": True}))
    assert text.startswith("simulated bags; 3 fold(s)")
    assert sum("AUROC" in line for line in text.splitlines()) == 2
    t1 = t.where(t.fold == 0)
    t1 = P.make_predictions(t1.case_id, t1.slide_id, 0, t1.mode, np.zeros(len(t1), int), t1.probs)
    assert "n/a" in S.print_table(S.summarise(t1, num_classes=2, bootstrap=20))


def test_slides_of_a_single_patient_need_the_slide_as_unit():
    t = table(n=30)
    t = P.make_predictions(["one"] * 30, t.slide_id, t.fold, t.mode, t.label, t.probs)
    by_patient, by_slide = (S.summarise(t, num_classes=2, bootstrap=50, unit=u) for u in ("patient", "slide"))
    row = by_patient["modes"]["pathology"]["metrics"]["auroc"]
    assert row["ci"] == [None, None] and row["reason"] == "fold 0 holds one patient: nothing to resample"
    assert by_slide["modes"]["pathology"]["metrics"]["auroc"]["ci"][0] is not None
    assert by_slide["bootstrap"]["unit"] == "slide" and "over slides" in S.print_table(by_slide)
    with pytest.raises(ValueError, match="unit must be one of"):
        S.summarise(t, num_classes=2, unit="patch")
