"""Metrics recomputed from predictions that the authors of MCAT and PathomicFusion published, against their values."""

import functools

import numpy as np
import pandas as pd
import pytest

from histokd_jax.evals.survival import concordance as cc
from histokd_jax.evals.survival import dynamic_auc, groups, resampling
from histokd_jax.evals.survival.logrank import logrank

pytestmark = pytest.mark.real_data
COHORTS = ("blca", "brca", "gbmlgg", "ucec")
MCAT = "MCATsm_nll_surv_a0.0_5foldcv_gc32_concat"


@functools.cache
def read(path, columns=None):
    return pd.read_csv(path, usecols=columns)


def predictions(real_data, cohort):
    return read(real_data / f"reference_predictions/mcat_iccv/tcga_{cohort}_val_risk.csv.gz")


def published(real_data, name):
    return read(real_data / f"reference_predictions/mcat_iccv/{name}.csv")


def arrays(rows):
    return rows["risk"].to_numpy(), rows["survival"].to_numpy(), rows["censorship"].to_numpy() == 0


def patients(rows):
    risk, time, event = arrays(rows)
    return groups.per_patient(rows["case_id"], rows["fold"].to_numpy(), time, event, risk, across_folds=True)


@pytest.mark.parametrize("cohort", COHORTS)
def test_C23_B12_c_index_of_every_model_and_fold(real_data, cohort):
    table = published(real_data, "summary_latest").query("cohort == @cohort")
    assert len(table) == 55
    rows = predictions(real_data, cohort)
    for row in table.itertuples():
        ours = cc.harrell_c(*arrays(rows[(rows["model"] == row.model) & (rows["fold"] == row.fold)]))
        assert ours.value == pytest.approx(row.val_cindex, rel=0, abs=1e-12), (row.model, row.fold)


@pytest.mark.parametrize("cohort", COHORTS)
def test_B12_mean_spread_pooled_c_index_and_log_rank_p_of_every_model(real_data, cohort):
    table = published(real_data, "cindex").query("cohort == @cohort")
    assert len(table) == 11
    for _, row in table.iterrows():
        rows = predictions(real_data, cohort).query("model == @row.model")
        risk, time, event = arrays(rows)
        folds = resampling.c_index(rows["case_id"], rows["fold"].to_numpy(), time, event, risk, resamples=2)
        assert folds.value == pytest.approx(row["Val C-Index (Mean)"], abs=1e-12)
        assert folds.std == pytest.approx(row["Val C-Index (STD)"], abs=1e-12)
        whole = patients(rows)
        pooled = cc.harrell_c(whole.risk, whole.time, whole.event, tied_tolerance=0)
        assert pooled.value == pytest.approx(row["C-Index (All)"], abs=1e-12), row.model
        split = groups.median_split(whole.risk)
        p = logrank(whole.time, whole.event, split, groups=(groups.LOW, groups.HIGH)).p
        assert p == pytest.approx(row["P-Value"], rel=1e-6), row.model


@pytest.mark.parametrize("cohort,p", [("blca", 8.42e-4), ("brca", 6.05e-2), ("gbmlgg", 8.98e-31), ("ucec", 1.30e-3)])
def test_C24_log_rank_p_of_mcat(real_data, cohort, p):
    whole = patients(predictions(real_data, cohort).query("model == @MCAT"))
    assert logrank(whole.time, whole.event, groups.median_split(whole.risk)).p == pytest.approx(p, rel=1e-2)


@pytest.mark.parametrize(
    "cohort,n_missing,exclude,count_as_zero",
    [("blca", 1, 0.645, 0.666), ("ucec", 1, 0.652, 0.690), ("brca", 3, 0.647, 0.726)],
)
def test_C25_missing_patients_inflate_the_published_index(real_data, cohort, n_missing, exclude, count_as_zero):
    """Section 11, D17, on the first fold of MCAT, as if its first patients had no features."""
    rows = arrays(predictions(real_data, cohort).query("model == @MCAT and fold == 0"))
    assert cc.harrell_c(*rows).value == pytest.approx(exclude, abs=5e-4)
    missing = np.arange(len(rows[0])) < n_missing
    kept = cc.harrell_c(*(x[~missing] for x in rows)).value
    inflated = cc.harrell_c(*cc.count_missing_as_zero(*rows, missing)).value
    assert inflated == pytest.approx(count_as_zero, abs=5e-4)
    assert inflated > kept + 0.01


@pytest.mark.parametrize("cohort", COHORTS)
def test_constant_risk_of_deep_sets_is_one_half_in_every_fold(real_data, cohort):
    """Section 12.4: published as exactly 0.5 except for GBMLGG."""
    rows = predictions(real_data, cohort).query("model == 'DSsm_nll_surv_a0.0_5foldcv_gc32_sig'")
    for _, fold in rows.groupby("fold"):
        ours = cc.harrell_c(*arrays(fold))
        assert (ours.value == 0.5 and ours.n_tied == ours.n_comparable) or cohort == "gbmlgg"


@pytest.mark.parametrize("cohort", ["blca", "ucec"])
def test_integrated_auc_of_every_model(real_data, cohort):
    """The published censoring model counts a training patient once per slide; the mean is the weighted one."""
    slides = read(
        real_data / f"tcga_genomics/mcat/datasets_csv_sig/tcga_{cohort}_all_clean.csv.zip",
        ("case_id", "survival_months", "censorship"),
    )
    for _, row in published(real_data, "cindex").query("cohort == @cohort").iterrows():
        values = []
        for _, val in predictions(real_data, cohort).query("model == @row.model").groupby("fold"):
            train = slides[~slides["case_id"].isin(val["case_id"])]
            follow_up = train["survival_months"].to_numpy(), train["censorship"].to_numpy() == 0
            values.append(dynamic_auc.integrated_auc(*arrays(val), *follow_up).weighted_mean)
        assert np.mean(values) == pytest.approx(row["Val I-AUC (Mean)"], rel=1e-9), row.model
        assert np.std(values, ddof=1) == pytest.approx(row["Val I-AUC (STD)"], rel=1e-9, abs=1e-12), row.model


@pytest.mark.parametrize("model,n", [("omic", 15), ("omicomic_fusion", 15), ("pathomic_fusion", 15)])
def test_B12_pathomic_fusion_c_index_of_every_split(real_data, model, n):
    """Its image models predict per patch, and the published index ranks patches as if they were patients."""
    folder = real_data / "reference_predictions/pathomic_fusion"
    rows = read(folder / "TCGA_GBMLGG_survival_test.csv.gz").query("model == @model")
    table = read(folder / "TCGA_GBMLGG_survival_cindex.csv").query("model == @model")
    assert len(table) == n
    for row in table.itertuples():
        own = rows[rows["split"] == row.split]
        follow_up = own["survtime_days"].to_numpy(), own["event"].to_numpy()
        ours = cc.harrell_c(own["hazard"].to_numpy(), *follow_up, tied_tolerance=0)
        assert ours.value == pytest.approx(row.published_cindex, abs=1e-12), row.split
