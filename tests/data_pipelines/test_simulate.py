"""The simulated cohort: openly labelled, reproducible, with the planted signal that its manifest states."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_pipelines import simulate, simulate_bags, simulate_table
from data_pipelines.cohort import build_cohort
from data_pipelines.errors import DataError
from data_pipelines.gene_ranking import cox_fit
from data_pipelines.reader import BagReader
from data_pipelines.simulate import DEMO, SimulationSpec, simulate_cohort
from data_pipelines.simulate_table import simulate_bags_for_table

TINY = SimulationSpec(n_cases=12, feat_dim=8, n_genes=32, bag_median=20.0, bag_min=3, signal_genes=4)


def _tree(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def _auc(x, y, c):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    return roc_auc_score(y, cross_val_predict(model, x, y, cv=folds, method="decision_function"))


def test_equal_specs_give_equal_bytes_and_other_seeds_other_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        simulate_cohort(tmp_path / name, dataclasses.replace(TINY, seed=seed))
    a, b, c = (_tree(tmp_path / name) for name in "abc")
    assert a == b
    changed = {str(path) for path in a if a[path] != c.get(path)}
    assert {"manifest.json", "slides.csv", "tables/genes.npz", "tables/labels.csv", "tables/survival.csv"} <= changed


def test_cohort_joins_completely_and_says_that_it_is_simulated(tmp_path):
    manifest = simulate_cohort(tmp_path / "sim", dataclasses.replace(TINY, task="PR"))
    tables = tmp_path / "sim" / "tables"
    cohort = build_cohort(
        manifest,
        labels_path=tables / "labels.csv",
        task="PR",
        genes_path=tables / "genes.npz",
        survival_path=tables / "survival.csv",
    )
    assert len(cohort) == TINY.n_cases and not cohort.dropped
    assert cohort.genes.values.shape == (12, 32)
    assert np.isfinite(cohort.survival.time_months).all()
    assert manifest.simulated and "simulated" in manifest.name
    assert manifest.encoder["name"] == "simulated"
    assert manifest.simulation["what"].count("simulated") == 4
    assert manifest.simulation["spec"] == dataclasses.asdict(dataclasses.replace(TINY, task="PR"))
    assert all(
        s.case_id.startswith("SIM-") and "SIMBAG" in s.slide_id and s.source == "simulated" for s in manifest.slides
    )


def test_stored_bag_is_the_drawn_bag_up_to_order_and_float16(tmp_path):
    manifest = simulate_cohort(tmp_path / "sim", TINY)
    latents, geometry = simulate.draw_latents(TINY), simulate_bags.draw_geometry(TINY, 1)
    sizes = simulate_bags.bag_sizes(TINY, TINY.n_cases)
    shift = TINY.signal_patches * latents.tissue_score[5] * geometry.planted[0]
    bag = simulate_bags.draw_bag(TINY, geometry, 5, int(sizes[5]), shift)
    features, coords = BagReader(manifest).read_bag(5)
    expected = {tuple(c): f for c, f in zip(bag.coords.tolist(), bag.features.astype(np.float16))}
    assert len(expected) == len(coords) == manifest.sizes[5]
    for c, f in zip(coords.tolist(), features):
        np.testing.assert_array_equal(np.asarray(f, np.float16), expected[tuple(c)])


def test_bag_sizes_are_log_normal_and_clipped():
    spec = dataclasses.replace(TINY, bag_median=200.0, bag_sigma=0.6, bag_min=1, bag_max=10**6)
    log_size = np.log(simulate_bags.bag_sizes(spec, 4000) / 200.0) / 0.6
    assert stats.kstest(log_size, "norm").pvalue > 0.01
    clipped = simulate_bags.bag_sizes(dataclasses.replace(spec, bag_min=150, bag_max=300), 1000)
    assert clipped.min() == 150 and clipped.max() == 300


def test_bags_do_not_depend_on_the_number_of_cases():
    geometry = simulate_bags.draw_geometry(TINY, 1)
    more = dataclasses.replace(TINY, n_cases=500)
    shift = np.zeros(TINY.feat_dim, np.float32)
    a, b = (simulate_bags.draw_bag(spec, geometry, 3, 40, shift) for spec in (TINY, more))
    np.testing.assert_array_equal(a.features, b.features)


def test_informative_patches_differ_between_classes_by_the_stated_gap():
    spec = SimulationSpec(n_cases=600, feat_dim=16, n_genes=8, signal_genes=2, bag_median=60.0, signal_patches=1.5)
    latents, geometry = simulate.draw_latents(spec), simulate_bags.draw_geometry(spec, 1)
    planted = geometry.planted[0]
    tissue = float(geometry.tissues[0] @ planted)
    informative, other = [], []
    for row in range(spec.n_cases):
        bag = simulate_bags.draw_bag(spec, geometry, row, 60, spec.signal_patches * latents.tissue_score[row] * planted)
        projection = bag.features @ planted
        informative.append(projection[bag.witness].mean() - tissue if bag.witness.any() else np.nan)
        other.append(projection[~bag.witness].mean())
    expected = simulate.expected_witness_gap(spec)
    gap, error = _class_gap(np.array(informative), latents.label)
    assert abs(gap - expected) < 3 * error < expected
    gap, error = _class_gap(np.array(other), latents.label)
    assert abs(gap) < 3 * error


def _class_gap(value, label):
    one, zero = (value[(label == k) & np.isfinite(value)] for k in (1, 0))
    error = math.sqrt(one.var(ddof=1) / len(one) + zero.var(ddof=1) / len(zero))
    return one.mean() - zero.mean(), error


def test_stated_gap_matches_a_large_draw_of_the_latents():
    spec = dataclasses.replace(TINY, n_cases=200_000, prevalence=0.3, n_programmes=1)
    latents = simulate.draw_latents(spec)
    gap, error = _class_gap(spec.signal_patches * latents.tissue_score, latents.label)
    assert abs(gap - simulate.expected_witness_gap(spec)) < 4 * error


def test_witness_fraction_and_prevalence_are_met():
    spec = dataclasses.replace(TINY, n_cases=3000, witness_fraction=0.25, prevalence=0.2)
    latents, geometry = simulate.draw_latents(spec), simulate_bags.draw_geometry(spec, 1)
    zero = np.zeros(spec.feat_dim, np.float32)
    fraction = np.array([simulate_bags.draw_bag(spec, geometry, row, 50, zero).witness.mean() for row in range(400)])
    assert abs(fraction.mean() - 0.25) < 3 * fraction.std() / 20
    assert abs(latents.label.mean() - 0.2) < 3 * math.sqrt(0.2 * 0.8 / 3000)


def test_check_N_genes_are_more_informative_than_patches_at_the_calibrated_strength():
    spec = dataclasses.replace(DEMO, n_cases=300)
    latents, geometry = simulate.draw_latents(spec), simulate_bags.draw_geometry(spec, 1)
    sizes = simulate_bags.bag_sizes(spec, spec.n_cases)
    pooled = []
    for row, n in enumerate(sizes):
        shift = spec.signal_patches * latents.tissue_score[row] * geometry.planted[0]
        pooled.append(simulate_bags.draw_bag(spec, geometry, row, int(n), shift).features.mean(axis=0))
    genes = simulate.draw_genes(spec, latents, simulate.case_ids(spec.n_cases)).values
    bags_auc, genes_auc = _auc(np.array(pooled), latents.label, 1e-2), _auc(genes, latents.label, 1e-3)
    assert 0.75 < bags_auc < 0.87
    assert 0.93 < genes_auc < 0.98


def test_cox_ranking_finds_the_programme_genes():
    spec = dataclasses.replace(TINY, n_cases=400, n_genes=200, signal_genes=10)
    latents = simulate.draw_latents(spec)
    genes = simulate.draw_genes(spec, latents, simulate.case_ids(spec.n_cases)).values.astype(np.float64)
    fit = cox_fit(genes, latents.time_months, latents.event.astype(bool))
    programme, loading = simulate.gene_loadings(spec)
    signal = set(np.flatnonzero((programme == 0) & (loading != 0)))
    assert len(signal) == 10
    top = set(np.argsort(-np.abs(fit.z))[:10])
    assert len(top & signal) >= 9
    assert 0.3 < latents.event.mean() < 0.7


def test_genes_have_unit_variance():
    spec = dataclasses.replace(TINY, n_cases=4000)
    values = simulate.draw_genes(spec, simulate.draw_latents(spec), simulate.case_ids(4000)).values
    np.testing.assert_allclose(values.std(axis=0), 1.0, atol=0.05)
    np.testing.assert_allclose(values.mean(axis=0), 0.0, atol=0.08)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n_cases": 0}, "n_cases"),
        ({"signal_genes": 33}, "signal_genes"),
        ({"witness_fraction": 1.0}, "witness_fraction"),
        ({"tissue_fidelity": 1.1}, "tissue_fidelity"),
        ({"bag_min": 50}, "bag_min"),
        ({"label_noise": float("nan")}, "label_noise"),
    ],
)
def test_bad_spec_is_refused_by_field(change, field):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TINY, **change)


@pytest.fixture
def real_tables(tmp_path):
    """Stand-ins for a table of labels (one case without genes) and a PORPOISE-like gene table."""
    rng = np.random.default_rng(0)
    labels = tmp_path / "labels.csv"
    labels.write_text("case_id,ER,HER2\nP-1,1,0\nP-2,0,\nP-3,,1\nP-4,,\nP-5,1,0\nP-9,1,1\n")
    genes = tmp_path / "genes.csv"
    rows = [f"P-{i},{i}.5,{i % 2}," + ",".join(f"{v:.3f}" for v in rng.normal(size=3)) for i in range(1, 7)]
    genes.write_text("case_id,survival_months,censorship,A_rnaseq,B_rnaseq,C_rnaseq\n" + "\n".join(rows) + "\n")
    return labels, genes


def test_bags_for_real_tables_keep_the_tables_and_say_simulated_bags(tmp_path, real_tables):
    labels, genes = real_tables
    manifest = simulate_bags_for_table(
        tmp_path / "out", TINY, labels_path=labels, genes_path=genes, tasks=("ER", "HER2")
    )
    assert [s.case_id for s in manifest.slides] == ["P-1", "P-2", "P-3", "P-5"]
    assert all(s.slide_id == f"{s.case_id}-SIMBAG" for s in manifest.slides)
    assert "simulated_bags" in manifest.name and manifest.simulated
    assert manifest.simulation["what"] == manifest.notes == "simulated bags, real genes and labels"
    assert manifest.simulation["cases_without_bag"] == {"no genes": ["P-9"], "no label": ["P-4", "P-6"]}
    tables = tmp_path / "out" / "tables"
    assert (tables / "labels.csv").read_bytes() == labels.read_bytes()
    cohort = build_cohort(
        manifest,
        labels_path=tables / "labels.csv",
        task="ER",
        genes_path=tables / "genes.npz",
        survival_path=tables / "survival.csv",
    )
    assert dict(zip(cohort.case_id, cohort.label)) == {"P-1": 1, "P-2": 0, "P-5": 1}
    np.testing.assert_allclose(cohort.survival.time_months, [1.5, 2.5, 5.5])
    np.testing.assert_array_equal(cohort.survival.event, [False, True, False])


def test_case_shifts_have_the_stated_correlation_with_every_label():
    n = 20_000
    rng = np.random.default_rng(1)
    signs = np.stack([rng.choice((-1.0, 1.0), n), rng.choice((-1.0, 0.0, 1.0), n)], axis=1)
    components = rng.standard_normal((n, 2))
    shifts = simulate_table.case_shifts(TINY, signs, components)
    # E[s | +] - E[s | -] = 2 r E|N(0, 1)|, r the correlation of tissue score and severity.
    expected = 2 * TINY.signal_patches * simulate_bags.label_fidelity(TINY) * math.sqrt(2 / math.pi)
    for task in range(2):
        gap = shifts[signs[:, task] > 0, task].mean() - shifts[signs[:, task] < 0, task].mean()
        assert abs(gap - expected) < 0.05
    assert abs(shifts[signs[:, 1] == 0, 1].mean()) < 0.05
    np.testing.assert_allclose(shifts[:, 2:], simulate_table.EXPRESSION_SHIFT * components, rtol=1e-5)


def test_expression_components_survive_extreme_outliers():
    rng = np.random.default_rng(2)
    factor = rng.standard_normal(200)
    values = (factor[:, None] * rng.choice((-1, 1), 40) + 0.5 * rng.standard_normal((200, 40))).astype(np.float32)
    values[3, 7], values[9, 1] = 36893.0, np.nan
    components = simulate_table.expression_components(values)
    assert abs(np.corrcoef(components[:, 0], factor)[0, 1]) > 0.95
    np.testing.assert_allclose(components.std(axis=0), 1.0, rtol=1e-6)


def test_tables_that_do_not_join_are_refused(tmp_path, real_tables):
    _, genes = real_tables
    labels = tmp_path / "other.csv"
    labels.write_text("case_id,ER\nQ-1,1\nQ-2,0\n")
    with pytest.raises(DataError, match="none of 2 labelled cases"):
        simulate_bags_for_table(tmp_path / "out", TINY, labels_path=labels, genes_path=genes, tasks=("ER",))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_repeated_task_is_refused(tmp_path, real_tables):
    labels, genes = real_tables
    with pytest.raises(DataError, match="distinct"):
        simulate_bags_for_table(tmp_path / "out", TINY, labels_path=labels, genes_path=genes, tasks=("ER", "ER"))


@pytest.mark.real_data
def test_tcga_brca_cases_all_get_bags(tmp_path, real_data):
    manifest = simulate_bags_for_table(
        tmp_path / "brca",
        dataclasses.replace(TINY, bag_median=4.0),
        labels_path=real_data / "tcga_brca_ihc" / "labels.csv",
        genes_path=real_data / "tcga_genomics/porpoise/datasets_csv_mutsig/tcga_brca_all_clean.csv.zip",
        tasks=("ER", "PR", "HER2"),
    )
    assert len(manifest.slides) == 750
    tables = tmp_path / "brca" / "tables"
    for task, n, positive in (("ER", 719, 554), ("PR", 716, 484), ("HER2", 705, 103)):
        cohort = build_cohort(manifest, labels_path=tables / "labels.csv", task=task, genes_path=tables / "genes.npz")
        assert (len(cohort), int(cohort.label.sum())) == (n, positive)
    assert "simulated" in json.loads((tmp_path / "brca" / "manifest.json").read_text())["name"]
