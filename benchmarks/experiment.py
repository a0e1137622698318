"""What the experiment scripts share: runs that resume, AUC with intervals, linear baselines on the same folds."""

from __future__ import annotations

import argparse
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from histokd_jax.evals import summary as summaries
from histokd_jax.evals.predictions import Predictions, concatenate, make_predictions, read_predictions
from histokd_jax.train import cache, run
from histokd_jax.train.experiment import Experiment
from histokd_jax.utils import config

BOOTSTRAP = 2000
# Cohorts of a few hundred small bags: a higher rate, annealed over the epochs that are run.
SHORT_TRAINING = (
    "train.lr=5e-4",
    "train.max_epochs=30",
    "train.lr_schedule=cosine_to_max_epochs",
    "early_stop.patience=12",
    "ckpt.every_epochs=100",
)


def parser(description: str | None, name: str, *, real_data: bool) -> argparse.ArgumentParser:
    """Arguments of every experiment: where real data lie, where runs and the JSON go, smoke."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if real_data:
        arguments.add_argument(
            "--data",
            type=pathlib.Path,
            default=os.environ.get("HISTOKD_REAL_DATA"),
            help="folder of real data; default: the environment variable HISTOKD_REAL_DATA",
        )
    arguments.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs") / name)
    arguments.add_argument("--out", type=pathlib.Path, help=f"default: benchmarks/results/{name}.json")
    arguments.add_argument("--smoke", action="store_true", help="minimal sizes: only shows that it runs")
    return arguments


def start(args: argparse.Namespace) -> float:
    """Checks the data folder, turns on the compilation cache; returns the start time."""
    if getattr(args, "data", "") is None:
        raise SystemExit("give --data FOLDER or set HISTOKD_REAL_DATA: real data are not part of the repository")
    flags.FLAGS.mark_as_parsed()
    cache.enable()
    return time.perf_counter()


def train_run(spec: str, overrides: Sequence[str], workdir: pathlib.Path) -> pathlib.Path:
    """Trains both arms of a configuration; a finished run is only read."""
    run.train(
        config.load(spec, [*overrides, f"report.bootstrap={BOOTSTRAP}"]), workdir, ["experiment", spec, *overrides]
    )
    return workdir


def predictions(workdir: pathlib.Path, mode: str | None = None) -> Predictions:
    """Test predictions of a run, of one mode or all."""
    table = read_predictions(workdir / "predictions_test.csv")
    return table if mode is None else table.of_mode(mode)


def auc_table(table: Predictions, unit: str = "patient") -> dict[str, Any]:
    """mode -> AUROC per fold, mean, population std and bootstrap interval."""
    summary = summaries.summarise(table, num_classes=table.num_classes, bootstrap=BOOTSTRAP, unit=unit)
    return {mode: found["metrics"]["auroc"] for mode, found in summary["modes"].items()}


def paired(a: Predictions, b: Predictions, mode: str, metric: str = "auroc", unit: str = "patient") -> dict[str, Any]:
    """Paired difference a - b of one mode with its interval."""
    compared = summaries.compare(a.of_mode(mode), b.of_mode(mode), bootstrap=BOOTSTRAP, unit=unit)
    return compared["modes"][mode]["metrics"][metric]


def baseline(
    experiment: Experiment,
    inputs: np.ndarray,
    fit_predict: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    mode: str,
    *,
    with_val: bool = True,
) -> Predictions:
    """Predictions of a simple model on the folds of an experiment.

    Args:
      experiment: cohort and folds.
      inputs: [n, F] one row per cohort sample.
      fit_predict: (train x, train y, test x) -> [m, C] probabilities.
      mode: name in the table.
      with_val: train on train and validation patients together.
    """
    cohort, parts = experiment.cohort, []
    for k, split in enumerate(experiment.folds):
        rows = np.concatenate([split.train, split.val]) if with_val else split.train
        probs = fit_predict(inputs[rows], cohort.label[rows], inputs[split.test])
        case_id, slide_id = ([ids[r] for r in split.test] for ids in (cohort.case_id, cohort.slide_id))
        parts.append(make_predictions(case_id, slide_id, k, mode, cohort.label[split.test], probs))
    return concatenate(parts)


def logistic_regression(clip: float | None = 5.0, costs: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)):
    """Standardised, class-balanced logistic regression, C tuned by 3 folds inside the training part.

    The inner score is AUC for two classes and balanced accuracy for more (a rare class may miss an inner fold).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def fit(x, y, cost):
        model = LogisticRegression(C=cost, class_weight="balanced", max_iter=500)
        return make_pipeline(StandardScaler(), model).fit(x, y)

    def score(x, y, cost):
        found = []
        for a, b in StratifiedKFold(3, shuffle=True, random_state=0).split(x, y):
            model = fit(x[a], y[a], cost)
            if len(model.classes_) == 2:
                found.append(roc_auc_score(y[b], model.predict_proba(x[b])[:, 1]))
            else:
                found.append(balanced_accuracy_score(y[b], model.predict(x[b])))
        return float(np.mean(found))

    def fit_predict(x, y, test):
        x, test = (t if clip is None else np.clip(t, -clip, clip) for t in (x, test))
        best = max(costs, key=lambda cost: score(x, y, cost))
        return fit(x, y, best).predict_proba(test)

    return fit_predict


def show(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints name, mean, std and interval."""
    print(title)
    for name, found in rows.items():
        low, high = (float("nan") if v is None else v for v in found["ci"])
        print(f"  {name:44s} {found.get('mean', found.get('difference')):+.3f} [{low:+.3f}, {high:+.3f}]")
