"""`exp_survival_genes`: the smoke run on invented tables, and the protocol of its two recipes."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest

from histokd_jax.utils import config

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import exp_survival_genes as exp  # noqa: E402
from benchmarks import gene_survival as gs  # noqa: E402

LEAKS = {"censorship", "train", "survival_months", "event", "case_id", "slide_id"}
FOLDS = 5


def write_cohort(root, source, name, *, n=100, genes=12, extra=("train",), seed=0):
    """One invented cohort in the layout of the real files: a table with a slide per row, five split files."""
    rng = np.random.default_rng(seed)
    cases = [f"TCGA-{i:04d}" for i in range(n)]
    values = rng.normal(size=(n, genes))
    death, censored = rng.exponential(np.exp(-1.5 * values[:, 0]) * 20), rng.exponential(30, n)
    table = {
        "case_id": cases,
        "slide_id": [f"{case}.svs" for case in cases],
        "survival_months": np.minimum(death, censored).round(3) + 0.001,
        "censorship": (death > censored).astype(int),
        **{column: np.ones(n) for column in extra},
        **{f"G{i}_rnaseq": values[:, i] for i in range(genes)},
    }
    folder = root / "tcga_genomics" / source
    tables, splits = folder / gs.TABLES[source], folder / "splits/5foldcv" / f"tcga_{name}"
    tables.mkdir(parents=True)
    splits.mkdir(parents=True)
    # The first patient has two slides.
    frame = pd.DataFrame(table)
    frame = pd.concat([frame, frame.iloc[:1].assign(slide_id="second.svs")])
    frame.to_csv(tables / f"tcga_{name}_all_clean.csv.zip", index=False)
    for k in range(FOLDS):
        val = cases[k::FOLDS]
        columns = {"train": [case for case in cases if case not in val], "val": val}
        pd.DataFrame({part: pd.Series(ids) for part, ids in columns.items()}).fillna("").to_csv(
            splits / f"splits_{k}.csv"
        )
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("tcga")
    write_cohort(root, "mcat", "ucec")
    return write_cohort(root, "porpoise", "kirp", seed=1)


@pytest.mark.bench
def test_smoke_run_writes_the_common_schema_and_continues(data, tmp_path):
    pytest.importorskip("sksurv")
    out, command = tmp_path / "exp.json", [sys.executable, "-m", "benchmarks.exp_survival_genes", "--smoke"]
    command += ["--data", str(data), "--out", str(out), "--workdir", str(tmp_path / "work")]
    stopped = subprocess.run([*command, "--budget", "0"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert stopped.returncode == exp.UNFINISHED and not out.exists() and "parts are left" in stopped.stderr
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["schema"] == 1 and record["benchmark"] == "exp_survival_genes" and record["derived"]["smoke"]
    assert set(record["derived"]["cohorts"]) == {"mcat/ucec", "porpoise/kirp"}
    for cohort in record["derived"]["cohorts"].values():
        assert cohort["patients"] == 100 and cohort["columns"] == 12
        for row in cohort["c_index"].values():
            assert len(row["per_fold"]) == FOLDS and row["ci"][0] <= row["mean"] <= row["ci"][1]
        assert cohort["c_index"]["ridge_100"]["mean"] > 0.6, "one of twelve genes sets the hazard"
        gap = cohort["paired"]["corrected_cox - ridge_100"]["difference"]
        expected = cohort["c_index"]["corrected_cox"]["mean"] - cohort["c_index"]["ridge_100"]["mean"]
        assert gap == pytest.approx(expected, abs=1e-12)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}
    assert len(files) == len(exp.parts(True))
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and files == {file: file.stat().st_mtime_ns for file in files}


def test_B13_only_the_positional_reading_lets_metadata_in(data):
    published, corrected = exp.recipes("mcat")["published"], exp.recipes("mcat")["corrected_cox"]
    by_name = gs.read_cohort(data, "mcat", "ucec", metadata=corrected.metadata)
    assert by_name.table.names == tuple(f"G{i}_rnaseq" for i in range(12)) and not LEAKS & set(by_name.table.names)
    shifted = gs.read_cohort(data, "mcat", "ucec", metadata=published.metadata)
    assert shifted.table.names == ("train", *(f"G{i}_rnaseq" for i in range(11)))
    assert exp.recipes("porpoise")["published"].metadata == "by_name"


@pytest.mark.real_data
@pytest.mark.parametrize("name,columns,lost", [("blca", 3062, "ZXDC_rnaseq"), ("ucec", 123, "ZNF823_cnv")])
def test_B13_D1_counts_of_the_real_tables(real_data, name, columns, lost):
    corrected = gs.read_cohort(real_data, "mcat", name, metadata="by_name")
    published = gs.read_cohort(real_data, "mcat", name, metadata="positional")
    assert not LEAKS & set(corrected.table.names) and lost in corrected.table.names
    assert len(published.table.names) == len(corrected.table.names) == columns
    assert set(published.table.names) ^ set(corrected.table.names) == {"train", lost}
    assert np.isfinite(gs.fold_inputs(published, published.folds[0], clip=None, metadata="positional")).all()


def test_features_depend_on_training_patients_only_and_are_clipped(data):
    cohort = gs.read_cohort(data, "porpoise", "kirp")
    split = cohort.folds[2]
    before = gs.fold_inputs(cohort, split, clip=2.0, metadata="by_name")
    cohort.table.values[split.test] += 100.0
    after = gs.fold_inputs(cohort, split, clip=2.0, metadata="by_name")
    np.testing.assert_array_equal(before[split.train], after[split.train])
    assert np.abs(before).max() <= 2.0 and (after[split.test] == 2.0).all()
    train = cohort.table.values[split.train].astype(np.float64)
    expected = np.clip((train - train.mean(0)) / train.std(0), -2.0, 2.0)
    np.testing.assert_allclose(after[split.train], expected, atol=1e-6)


def test_published_plan_carries_the_remainder_into_the_next_epoch():
    recipe = gs.Recipe(b=32, epochs=3)
    plan = gs.plan_updates(recipe, np.arange(10, 308), np.tile(np.arange(8), 50), seed=0)
    sizes, seen = [], 0
    for number, update in zip(plan["valid"].sum(1), plan["update"]):
        seen += number
        if update:
            sizes.append(seen)
            seen = 0
    # 298 patients: nine updates per epoch, ten patients wait for the next one, the last ten are lost (D19, C22).
    assert sizes == [32] * 9 + [42] + [32] * 8 + [42] + [32] * 8 and seen == 0
    used = plan["rows"][plan["valid"]]
    assert used.min() >= 10 and used.max() < 308 and (plan["rate"] == np.float32(2e-4)).all()


def test_corrected_plan_sees_every_patient_at_most_once_per_epoch():
    recipe = gs.recipe_of(config.load(exp.CORRECTED))
    train = np.arange(5, 205)
    plan = gs.plan_updates(recipe, train, np.zeros(300, int), seed=3)
    per_epoch = 200 // recipe.b
    assert recipe.b == 64 and plan["update"].all() and plan["valid"].all() and len(plan["update"]) == 20 * per_epoch
    for epoch in range(20):
        rows = plan["rows"][epoch * per_epoch : (epoch + 1) * per_epoch].ravel()
        assert len(set(rows)) == len(rows) == per_epoch * 64 and set(rows) <= set(train)
    assert recipe.loss.survival == "cox" and recipe.loss.l1 == 0 and recipe.clip == 5.0
    assert recipe.metadata == "by_name" and recipe.bins_from == "train_fold"


def reference_update(params, rows, genes, label, event, recipe):
    """Gradient of one window by jax.grad of a loss written out, and one Adam step with L2 in the gradient, float64."""

    def loss(params):
        h = genes[rows]
        for i in range(len(recipe.widths)):
            layer = params["body"][f"blocks_{i}"]
            z = h @ layer["kernel"] + layer["bias"][None]
            h = jax.numpy.where(z > 0, z, jax.numpy.exp(z) - 1)
        hazard = 1 / (1 + jax.numpy.exp(-(h @ params["head"]["kernel"] + params["head"]["bias"][None])))
        total = 0.0
        for i, row in enumerate(rows):
            alive = jax.numpy.prod(1 - hazard[i, : label[row]])
            died = -jax.numpy.log(alive) - jax.numpy.log(hazard[i, label[row]])
            total += died if event[row] else -jax.numpy.log(alive * (1 - hazard[i, label[row]]))
        l1 = sum(abs(leaf).sum() for leaf in jax.tree.leaves(params))
        return total / recipe.b + len(rows) * recipe.loss.l1 * l1

    def adam(p, g):
        g = g + recipe.wd * p
        return p - recipe.lr * g / (abs(g) + 1e-8)

    return jax.tree.map(adam, params, jax.grad(loss)(params))


@pytest.mark.slow
def test_one_update_is_a_sum_over_bags_with_the_l1_term_once_per_bag(data):
    """The first Adam step from a known start, without dropout, equals the written-out one; so does its risk."""
    cohort = gs.read_cohort(data, "mcat", "ucec")
    loss = gs.ObjectiveSpec(l1=1e-4, l1_scaling="per_bag")
    recipe = gs.Recipe(
        metadata="by_name", loss=loss, widths=(6, 5), dropout=0.0, b=32, epochs=1, lr=1e-2, remainder="drop"
    )
    plan = gs.plan_updates(
        recipe, cohort.folds[0].train, gs.sampling_class(gs.time_bins(cohort, recipe, 0), cohort.event), 0
    )
    plan = {name: value[:1] for name, value in plan.items()}
    genes = gs.fold_inputs(cohort, cohort.folds[0], clip=None, metadata="by_name")
    label = gs.time_bins(cohort, recipe, 0)
    arrays = {"genes": genes[None], "label": label[None], "event": cohort.event.astype(np.float32)}
    arrays["time_months"] = cohort.time.astype(np.float32)
    replica = {name: value[None] for name, value in plan.items()} | {
        "fold": np.zeros(1, np.int32),
        "seed": np.zeros(1, np.uint32),
    }
    risk = np.asarray(gs._program(recipe)(arrays, replica))[0]

    key = jax.random.fold_in(jax.random.key(np.uint32(0)), 0)
    net = gs.SnnNet(12, 4, recipe.widths, 0.0)
    params = net.init(jax.random.split(key)[0], None, {"genes": genes[:1]})["params"]
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda p: jax.numpy.asarray(np.asarray(p), jax.numpy.float64), params)
        new = reference_update(exact, plan["rows"][0], genes.astype(np.float64), label, cohort.event, recipe)
        logits = np.asarray(net.apply({"params": new}, None, {"genes": genes.astype(np.float64)})["logits"])
    hazard = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(risk, -np.cumprod(1 - hazard, axis=1).sum(1), rtol=2e-5)
