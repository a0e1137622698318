"""Genes chosen by boosted trees, their scopes, and labels that are missing: what MoMKD asks of the tables."""

import numpy as np
import pytest

from data_pipelines import gene_ranking, tables
from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable, select_genes

N, G = 80, 40
NAMES = tuple(f"G{i:02d}" for i in range(G))


def cohort(seed=0):
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(N) % 2)
    x = rng.normal(size=(N, G))
    x[:, 7] += 2.0 * label
    x[:, 21] -= 1.5 * label
    return x, label


def select(x, label, train, **options):
    table = GeneTable(tuple(f"C{i}" for i in range(N)), NAMES, np.exp2(x).astype(np.float32))
    options = {"ranking": "boosted_trees", "normalisation": "log2p1_then_zscore_train_fold", **options}
    return select_genes(table, train, top_k=30, token_size=1, label=label, **options)


def test_informative_genes_lead_and_unused_genes_follow_by_name():
    x, label = cohort()
    ranked = gene_ranking.rank_genes(x, NAMES, ranking="boosted_trees", label=label)
    importance = gene_ranking.tree_importance(x, label, NAMES)
    assert set(ranked.order[:2]) == {7, 21} and importance.sum() == pytest.approx(1)
    unused = [column for column in ranked.order if importance[column] == 0]
    assert unused and ranked.n_undefined == len(unused)
    assert list(ranked.order[-len(unused) :]) == sorted(unused)


def test_the_ranking_does_not_depend_on_the_columns():
    x, label = cohort()
    turn = np.random.default_rng(1).permutation(G)
    a = gene_ranking.rank_genes(x, NAMES, ranking="boosted_trees", label=label).order
    names = [NAMES[i] for i in turn]
    b = gene_ranking.rank_genes(x[:, turn], names, ranking="boosted_trees", label=label).order
    assert [NAMES[i] for i in a] == [names[i] for i in b]


def test_it_equals_scikit_learn_with_the_stated_settings():
    from sklearn.ensemble import GradientBoostingClassifier

    x, label = cohort()
    model = GradientBoostingClassifier(n_estimators=100, max_depth=3, learning_rate=0.01, random_state=0)
    expected = model.fit(x, label).feature_importances_
    np.testing.assert_allclose(gene_ranking.tree_importance(x, label, NAMES), expected, atol=1e-12)


@pytest.mark.parametrize("scope,free", [("per_fold_train", True), ("global", False)])
def test_C18_labels_of_other_patients_do_not_change_the_ranking(scope, free):
    x, label = cohort()
    train, test = np.arange(50), np.arange(50, N)
    flipped = label.copy()
    flipped[test] = 1 - flipped[test]
    a, b = (select(x, y, train, ranking_scope=scope) for y in (label, flipped))
    assert (a.names == b.names) == free


def test_the_published_scope_is_a_random_part_of_every_class_whatever_the_fold():
    x, label = cohort()
    a, b = (select(x, label, train, ranking_scope="global_80pct") for train in (np.arange(50), np.arange(30, N)))
    assert a.names == b.names and a.source["ranking_scope"] == "global_80pct"
    assert a.source["n_ranking_cases"] == 64
    np.testing.assert_array_equal(a.mean, b.mean)
    other = select(x, label, np.arange(50), ranking_scope="global_80pct", seed=1)
    assert not np.array_equal(a.mean, other.mean)


def test_bad_input_is_named():
    x, label = cohort()
    with pytest.raises(DataError, match="two classes"):
        gene_ranking.tree_importance(x, np.zeros(N, int), NAMES)
    with pytest.raises(DataError, match="'boosted_trees' needs labels"):
        gene_ranking.rank_genes(x, NAMES, ranking="boosted_trees")


@pytest.fixture
def label_file(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("case_id,PR\nA,Positive\nB,\nC,Equivocal\nD,Negative\n")
    return path


def test_missing_labels_are_dropped_or_negative(label_file):
    dropped = tables.read_labels(label_file, "PR")
    assert dropped.value.tolist() == [1, -1, -1, 0] and set(dropped.missing) == {"B", "C"}
    negative = tables.read_labels(label_file, "PR", missing="negative")
    assert negative.value.tolist() == [1, 0, 0, 0] and not negative.missing
    with pytest.raises(DataError, match="labels.missing='positive' is unknown"):
        tables.read_labels(label_file, "PR", missing="positive")
