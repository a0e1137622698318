"""Gene selection: order, leakage, normalisation, errors (checks G and L of the MKD specification)."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.gene_ranking import anova_f
from data_pipelines.genes import GeneSelection, GeneTable, select_genes

N, G = 40, 12
TRAIN = np.arange(24)


def make_table(seed=0, positive=False):
    values = np.random.default_rng(seed).normal(size=(N, G)) * 1.7 ** np.arange(G)
    values = np.exp2(np.abs(values) % 9) - 1 if positive else values
    names = tuple(f"GENE{i:02d}" for i in range(G))
    return GeneTable(tuple(f"case{i}" for i in range(N)), names, values.astype(np.float32))


def make_survival(seed=1):
    rng = np.random.default_rng(seed)
    return rng.exponential(30, N), rng.random(N) < 0.7


def select(table=None, **options):
    defaults = {"top_k": 8, "token_size": 4, "ranking": "variance"}
    return select_genes(make_table() if table is None else table, TRAIN, **defaults | options)


def test_check_G3_rank_order_is_kept():
    """Rank r must stand at position r, so that the model's reshape puts it into token r // token_size."""
    selection = select()
    assert selection.names == tuple(f"GENE{i:02d}" for i in range(11, 3, -1))
    np.testing.assert_array_equal(selection.columns, np.arange(11, 3, -1))
    np.testing.assert_array_equal(selection.apply(make_table().values), make_table().values[:, 11:3:-1])


def test_check_G4_top_k_must_be_divisible_by_token_size():
    with pytest.raises(DataError, match=r"genes.top_k=10 is not a positive multiple of genes.token_size=4.*top_k=8"):
        select(top_k=10)


@pytest.mark.parametrize("ranking", ["cox", "anova"])
def test_check_G6_test_survival_noise_leaves_ranking_unchanged(ranking):
    time, event = make_survival()
    label = (np.random.default_rng(2).random(N) < 0.5).astype(np.int32)
    noisy_time, noisy_event, noisy_label = time.copy(), event.copy(), label.copy()
    held_out = np.setdiff1d(np.arange(N), TRAIN)
    noisy_time[held_out] = np.random.default_rng(3).exponential(5, len(held_out))
    noisy_event[held_out] = ~event[held_out]
    noisy_label[held_out] = 1 - label[held_out]
    options = {"ranking": ranking, "top_k": 12}
    before = select(survival=(time, event), label=label, **options)
    after = select(survival=(noisy_time, noisy_event), label=noisy_label, **options)
    assert before.names == after.names
    # The test would be empty if the noise could not change a ranking at all.
    options["ranking_scope"] = "global"
    before = select(survival=(time, event), label=label, **options)
    after = select(survival=(noisy_time, noisy_event), label=noisy_label, **options)
    assert before.names != after.names
    assert before.source["n_ranking_cases"] == N


def test_check_L_statistics_reproducible_from_training_patients_alone():
    table = make_table(positive=True)
    changed = table.values.copy()
    changed[24:] = np.random.default_rng(9).exponential(100, (N - 24, G))
    options = {"normalisation": "log2p1_then_zscore_train_fold", "ranking": "cox", "survival": make_survival()}
    one = select(table, **options)
    two = select(dataclasses.replace(table, values=changed), **options)
    assert one.names == two.names
    np.testing.assert_array_equal(one.mean, two.mean)
    np.testing.assert_array_equal(one.std, two.std)


def test_log2p1_then_zscore_of_training_patients():
    table = make_table(positive=True)
    selection = select(table, normalisation="log2p1_then_zscore_train_fold", clip=1.5)
    logs = np.log2(table.values[:, selection.columns].astype(np.float64) + 1)
    expected = np.clip((logs - logs[TRAIN].mean(0)) / logs[TRAIN].std(0), -1.5, 1.5)
    np.testing.assert_allclose(selection.apply(table.values), expected, rtol=1e-5, atol=1e-6)
    # Variance is ranked before standardisation, after which all genes would tie.
    spread = np.log2(table.values[TRAIN].astype(np.float64) + 1).var(axis=0)
    np.testing.assert_array_equal(selection.columns, np.argsort(-spread)[:8])
    with pytest.raises(DataError, match=r"gene 'GENE.*case 'case.* is -.*precomputed_zscore"):
        select(normalisation="log2p1_then_zscore_train_fold")


def test_gene_constant_in_training_stays_finite():
    table = make_table(positive=True)
    values = table.values.copy()
    values[:24, 3] = 7.0
    selection = select(
        dataclasses.replace(table, values=values), normalisation="log2p1_then_zscore_train_fold", top_k=12
    )
    assert selection.names[-1] == "GENE03" and np.isfinite(selection.apply(values)).all()


def test_anova_ranks_the_values_the_network_sees():
    table, label = make_table(), np.arange(N) % 2
    values = table.values.copy()
    values[:, 5] = label * 2.0 + values[:, 5] * 0.1
    values[0, 5] = 1e4
    table = dataclasses.replace(table, values=values)
    assert select(table, ranking="anova", label=label, clip=3.0).names[0] == "GENE05"
    assert select(table, ranking="anova", label=label).names[0] != "GENE05"
    clipped = np.clip(values[TRAIN].astype(float), -3, 3)
    order = np.argsort(-anova_f(clipped, label[TRAIN])[0])
    np.testing.assert_array_equal(select(table, ranking="anova", label=label, clip=3.0).columns, order[:8])


def test_filters_bottom_and_random():
    assert select(filter="bottom").names == tuple(f"GENE{i:02d}" for i in range(7, -1, -1))
    one, two, other = (select(filter="random", ranking="cox", seed=seed) for seed in (5, 5, 6))
    assert one.names == two.names != other.names and len(set(one.names)) == 8
    assert one.source["seed"] == 5 and "ranking" not in one.source


def test_external_ranking_table():
    table = {f"GENE{i:02d}": p for i, p in ((3, 0.5), (7, 0.01), (1, 0.2), (9, 0.01), (99, 0.0))}
    selection = select(ranking="table", ranking_table=table, top_k=4)
    assert selection.names == ("GENE07", "GENE09", "GENE01", "GENE03")
    assert selection.source["ranking_scope"] == "external" and selection.source["n_undefined"] == 8
    with pytest.raises(DataError, match="only 4 genes are available"):
        select(ranking="table", ranking_table=table)


def test_too_few_genes_says_how_many_and_the_fix():
    with pytest.raises(DataError, match=r"top_k=16, but only 11 genes.*table 12.*at most 8"):
        select(top_k=16, exclude=["GENE11"])
    with pytest.raises(DataError, match="genes.token_size to at most 12"):
        select(top_k=512, token_size=512)


def test_exclude_is_by_name_and_notes_absent_names():
    selection = select(exclude=["GENE11", "ESR1"])
    assert selection.names[0] == "GENE10" and "GENE11" not in selection.names
    assert selection.source["excluded"] == ["GENE11"] and selection.source["excluded_but_absent"] == ["ESR1"]


def test_missing_values_are_named_or_read_as_zero():
    table = make_table()
    values = table.values.copy()
    values[7, 10] = np.nan
    holed = dataclasses.replace(table, values=values)
    with pytest.raises(DataError, match=r"1 gene values are missing, first \(gene 'GENE10', case 'case7'\)"):
        select(holed)
    selection = select(holed, nan_policy="zero")
    assert selection.apply(values)[7, selection.names.index("GENE10")] == 0
    assert select(holed, exclude=["GENE10"]).names[0] == "GENE11"


def test_cases_without_genes_do_not_enter_and_come_out_as_zero():
    table = make_table(positive=True)
    sparse = table.align([*table.case_id[:10], "unknown", *table.case_id[10:39]])
    np.testing.assert_array_equal(np.flatnonzero(~sparse.has_genes), [10])
    options = {"normalisation": "log2p1_then_zscore_train_fold"}
    selection = select(sparse, **options)
    logs = np.log2(table.values[:23].astype(np.float64) + 1)[:, selection.columns]
    np.testing.assert_allclose(selection.mean, logs.mean(axis=0))
    out = selection.apply_table(sparse)
    assert not out[10].any() and out[11].any()
    with pytest.raises(DataError, match="no training patient has genes"):
        select_genes(sparse, np.array([10]), top_k=4, token_size=4, ranking="variance")


def test_apply_table_finds_genes_by_name():
    selection = select()
    table = make_table()
    shuffled = GeneTable(table.case_id, table.names[::-1], table.values[:, ::-1].copy())
    np.testing.assert_array_equal(selection.apply_table(shuffled), selection.apply(table.values))
    lacking = GeneTable(table.case_id, table.names[:10], table.values[:, :10].copy())
    with pytest.raises(DataError, match=r"lacks 2 of the 8 genes.*GENE11"):
        selection.apply_table(lacking)


@pytest.mark.parametrize("normalisation", ["precomputed_zscore", "log2p1_then_zscore_train_fold"])
def test_json_round_trip_is_exact(normalisation):
    table = make_table(positive=True)
    selection = select(table, normalisation=normalisation, clip=2.5)
    again = GeneSelection.from_json(selection.to_json())
    assert (again.names, again.clip, again.source) == (selection.names, selection.clip, selection.source)
    np.testing.assert_array_equal(again.apply(table.values), selection.apply(table.values))


@pytest.mark.parametrize(
    "option, text",
    [
        ({"filter": "best"}, "genes.filter='best'"),
        ({"ranking_scope": "fold"}, "genes.ranking_scope"),
        ({"normalisation": "none"}, "genes.normalisation"),
        ({"nan_policy": "mean"}, "genes.nan_policy"),
        ({"ranking": "lasso"}, "genes.ranking='lasso'"),
        ({"clip": 0.0}, "genes.clip"),
        ({"token_size": 0}, "not a positive multiple"),
        ({"ranking": "cox"}, "needs survival"),
    ],
)
def test_bad_options(option, text):
    with pytest.raises(DataError, match=text):
        select(**option)


def test_gene_table_rejects_duplicates_infinities_and_wrong_shapes():
    values = np.zeros((2, 2), np.float32)
    with pytest.raises(DataError, match="case 'a' occurs twice"):
        GeneTable(("a", "a"), ("x", "y"), values)
    with pytest.raises(DataError, match="gene 'x' occurs twice"):
        GeneTable(("a", "b"), ("x", "x"), values)
    with pytest.raises(DataError, match="float32"):
        GeneTable(("a", "b"), ("x",), values)
    values[1, 0] = np.inf
    with pytest.raises(DataError, match="case 'b', gene 'x' is infinite"):
        GeneTable(("a", "b"), ("x", "y"), values)
