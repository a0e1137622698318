"""Gene rankings against lifelines, scikit-learn and hand-made cases."""

import warnings

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from sklearn.feature_selection import f_classif

from data_pipelines import gene_ranking, tables
from data_pipelines.errors import DataError


def lifelines_fit(x, time, event):
    data = pd.DataFrame({"x": np.asarray(x, float), "time": time, "event": event})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Tight limits: the default precision leaves the Wald statistic off by about 1e-4.
        options = {"precision": 1e-14, "r_precision": 1e-16}
        return CoxPHFitter().fit(data, "time", "event", fit_options=options)


def random_survival(n=120, genes=9, decimals=0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, genes)) * rng.uniform(0.1, 50, genes) + rng.normal(size=genes) * 10
    risk = 0.8 * (x[:, 0] - x[:, 0].mean()) / x[:, 0].std()
    time = np.round(rng.exponential(20 * np.exp(-risk)), decimals)
    return x, time, rng.random(n) < 0.6


@pytest.mark.parametrize("decimals", [0, 6], ids=["tied", "untied"])
def test_check_G_cox_equals_lifelines(decimals):
    x, time, event = random_survival(decimals=decimals)
    tied = len(time) - len(np.unique(time))
    assert (tied > 20) == (decimals == 0)
    fit = gene_ranking.cox_fit(x, time, event)
    reference = [lifelines_fit(x[:, g], time, event).summary.iloc[0] for g in range(x.shape[1])]
    np.testing.assert_allclose(fit.p, [r.p for r in reference], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(fit.coef, [r.coef for r in reference], rtol=1e-6, atol=1e-9)
    assert fit.converged.all() and fit.p[0] < 1e-6 < fit.p[1:].min()


def test_cox_chunks_do_not_matter(monkeypatch):
    x, time, event = random_survival()
    whole = gene_ranking.cox_pvalues(x, time, event)
    monkeypatch.setattr(gene_ranking, "_GENES_PER_CHUNK", 2)
    np.testing.assert_allclose(gene_ranking.cox_pvalues(x, time, event), whole, rtol=1e-9)


def test_cox_statistic_invariant_to_affine_maps_of_a_gene():
    x, time, event = random_survival()
    moved = gene_ranking.cox_fit(-3 * x + 7, time, event)
    np.testing.assert_allclose(moved.z, -gene_ranking.cox_fit(x, time, event).z, rtol=1e-6, atol=1e-8)


def test_cox_constant_and_separating_genes_get_p_one_and_are_counted(caplog):
    x, time, event = random_survival(decimals=6)
    x[:, 1] = 3.0
    # The earlier a patient dies the larger the gene: the likelihood grows for ever.
    event[:] = True
    x[:, 2] = -np.argsort(np.argsort(time))
    fit = gene_ranking.cox_fit(x, time, event)
    np.testing.assert_array_equal(np.flatnonzero(~fit.converged), [1, 2])
    np.testing.assert_array_equal(fit.p[[1, 2]], 1.0)
    assert np.isnan(fit.coef[[1, 2]]).all()
    gene_ranking.cox_pvalues(x, time, event)
    assert "2 of 9 genes" in caplog.text


def naive_efron_loglik(coef, x, time, event):
    total = 0.0
    for t in np.unique(time[event]):
        dead, risk, w = event & (time == t), time >= t, np.exp(coef * x)
        d = dead.sum()
        total += coef * x[dead].sum() - sum(np.log(w[risk].sum() - l / d * w[dead].sum()) for l in range(d))
    return total


@pytest.mark.parametrize("outlier", [50.0, 4000.0])
def test_cox_with_extreme_outlier_reaches_the_maximum(outlier):
    x, time, event = random_survival(genes=1)
    x = (x[:, 0] - x[:, 0].mean()) / x[:, 0].std()
    x[np.flatnonzero(event)[3]] = outlier
    fit = gene_ranking.cox_fit(x[:, None], time, event)
    assert fit.converged[0]
    best = naive_efron_loglik(fit.coef[0], x, time, event)
    scale = 1 / abs(x).max()
    for other in np.concatenate([fit.coef[0] + scale * np.linspace(-1, 1, 11), [0.0]]):
        assert naive_efron_loglik(other, x, time, event) <= best + 1e-9


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda x, t, e: (x, t, np.zeros_like(e)), "none of the 120 patients has an event"),
        (lambda x, t, e: (np.where(x == x[3, 2], np.nan, x), t, e), r"x is not finite at index \(3, 2\)"),
        (lambda x, t, e: (x, np.where(t == t[5], np.inf, t), e), "time is not finite"),
        (lambda x, t, e: (x[:-1], t, e), "expected x"),
    ],
)
def test_cox_bad_input(change, text):
    with pytest.raises(DataError, match=text):
        gene_ranking.cox_fit(*change(*random_survival()))


@pytest.mark.parametrize("classes", [2, 4])
def test_anova_equals_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    label = rng.integers(0, classes, 60)
    x = rng.normal(size=(60, 7)) * 1e3 + 1e4 + 500 * label[:, None] * (np.arange(7) == 2)
    f, p = gene_ranking.anova_f(x, label)
    expected_f, expected_p = f_classif(x, label)
    np.testing.assert_allclose(f, expected_f, rtol=1e-8)
    np.testing.assert_allclose(p, expected_p, rtol=1e-7)
    np.testing.assert_array_equal(gene_ranking.anova_pvalues(x, label), p)


def test_anova_degenerate_genes_and_bad_input():
    label = np.array([0, 0, 1, 1])
    f, p = gene_ranking.anova_f(np.array([[5.0, 1], [5, 1], [5, 2], [5, 2]]), label)
    np.testing.assert_array_equal(f, [0, np.inf])
    np.testing.assert_array_equal(p, [1, 0])
    with pytest.raises(DataError, match="two classes"):
        gene_ranking.anova_f(np.eye(4), np.zeros(4, int))
    with pytest.raises(DataError, match="not finite"):
        gene_ranking.anova_f(np.full((4, 2), np.nan), label)


def test_equal_scores_are_ordered_by_name():
    np.testing.assert_array_equal(gene_ranking.rank_by([1.0, 2.0, 1.0, 2.0], ["b", "z", "a", "y"]), [3, 1, 2, 0])
    with pytest.raises(DataError, match="'a' is NaN"):
        gene_ranking.rank_by([1.0, np.nan], ["b", "a"])


def test_variance_rank():
    x = np.random.default_rng(0).normal(size=(30, 4)) * [1, 9, 3, 6]
    np.testing.assert_array_equal(gene_ranking.variance_rank(x, list("abcd")), [1, 3, 2, 0])


def test_rank_genes_leaves_out_patients_without_target():
    x, time, event = random_survival(decimals=6)
    names = [f"g{i}" for i in range(9)]
    keep = np.arange(len(x)) % 3 > 0
    part = gene_ranking.rank_genes(x, names, ranking="cox", survival=(np.where(keep, time, np.nan), event))
    only = gene_ranking.rank_genes(x[keep], names, ranking="cox", survival=(time[keep], event[keep]))
    np.testing.assert_array_equal(part.order, only.order)
    assert part.n_cases == only.n_cases == keep.sum()
    label = (x[:, 4] > np.median(x[:, 4])).astype(int)
    by_label = gene_ranking.rank_genes(x, names, ranking="anova", label=np.where(keep, label, -1))
    assert by_label.order[0] == 4 and by_label.n_cases == keep.sum()


@pytest.mark.parametrize("ranking", ["cox", "anova", "table"])
def test_rank_genes_names_what_is_missing(ranking):
    with pytest.raises(DataError, match=f"genes.ranking='{ranking}' needs"):
        gene_ranking.rank_genes(np.eye(4), list("abcd"), ranking=ranking)
    with pytest.raises(DataError, match="unknown"):
        gene_ranking.rank_genes(np.eye(4), list("abcd"), ranking="lasso")


@pytest.mark.real_data
def test_check_G_cox_on_porpoise_equals_lifelines(real_data):
    path = real_data / "tcga_genomics/porpoise/datasets_csv_mutsig/tcga_brca_all_clean.csv.zip"
    genes, follow_up = tables.read_gene_table(path), tables.read_survival(path)
    assert genes.case_id == follow_up.case_id
    time, event = follow_up.survival
    fit = gene_ranking.cox_fit(genes.values, time, event)
    # In this gene nobody with raised expression dies, so its likelihood has no maximum.
    assert [genes.names[g] for g in np.flatnonzero(~fit.converged)] == ["IFNA6"]
    ordinary = np.flatnonzero(np.abs(genes.values).max(axis=0) < 10)[::20]
    assert len(ordinary) > 20
    expected = [lifelines_fit(genes.values[:, g], time, event).summary.p.iloc[0] for g in ordinary]
    np.testing.assert_allclose(fit.p[ordinary], expected, rtol=1e-6)
