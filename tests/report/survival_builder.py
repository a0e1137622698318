"""Writes synthetic run directories of survival models, as a finished training leaves them."""

import json
import pathlib

import numpy as np

from data_pipelines.survival import fit_time_bins
from data_pipelines.table_files import write_csv, write_json
from histokd_jax.evals import survival_predictions as P
from histokd_jax.evals import survival_summary as S
from histokd_jax.evals.summary import write_summary
from histokd_jax.evals.survival_measures import Reference

NOISE = {"pathology": 1.0, "both": 0.6}


def cohort(n=180, seed=0):
    """Latent severity, months and event of n patients."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    death = rng.exponential(60 * np.exp(-1.0 * z))
    censoring = rng.exponential(80, size=n)
    return z, np.maximum(np.minimum(death, censoring), 0.1), death <= censoring


def predictions(*, folds=5, extra_noise=0.0, seed=1, modes=tuple(NOISE), cox=False):
    z, time, event = cohort()
    bins = fit_time_bins(time, event)
    case = [f"TCGA-{i:04d}" for i in range(len(z))]
    parts = []
    for mode in modes:
        rng = np.random.default_rng(seed)
        score = z + (NOISE[mode] + extra_noise) * rng.normal(size=len(z))
        hazards = 1 / (1 + np.exp(-(0.8 * score[:, None] + np.array([-1.5, -1.0, -0.5, 0.0]))))
        risk = score if cox else -np.cumprod(1 - hazards, axis=1).sum(axis=1)
        fold = np.arange(len(z)) % folds
        slides = [f"{c}-a;{c}-b" for c in case]
        shown = hazards[:, :0] if cox else hazards
        parts.append(P.make_survival_predictions(case, slides, fold, mode, time, event, bins.assign(time), risk, shown))
    return (
        P.concatenate(parts),
        bins,
        {k: (time[np.arange(len(z)) % folds != k], event[np.arange(len(z)) % folds != k]) for k in range(folds)},
    )


def write_run(directory, *, control=True, weight=0.3, extra_noise=0.0, published=False, cox=False, folds=5):
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    test, bins, train = predictions(extra_noise=extra_noise, cox=cox, folds=folds)
    P.write_survival_predictions(directory / "predictions_test.csv", test)
    marks = ["reported part = validation part (published protocol), epoch selected on it"] if published else []
    facts = {"task_kind": "survival", "simulated": True, "left_out": {"no features": 2}} | (
        {"marks": marks} if marks else {}
    )
    references = {k: Reference(*follow_up, bins.edges) for k, follow_up in train.items()}
    write_summary(directory / "summary.json", S.summarise(test, references, bootstrap=100, facts=facts))
    for k, (time, event) in train.items():
        folder = directory / f"fold_{k}"
        folder.mkdir()
        rows = ((f"T{i}", t, int(e)) for i, (t, e) in enumerate(zip(time, event)))
        write_csv(folder / "follow_up_train.csv", ("case_id", "time_months", "event"), rows)
        write_json(folder / "time_bins.json", {"edges": list(bins.edges)})
        lines = []
        for epoch in range(12):
            common = {"step": epoch, "epoch": epoch, "stage": "train"}
            lines.append({**common, "split": "train", "loss": 1.5 * 0.9**epoch, "nll": 1.4 * 0.9**epoch})
            c = {f"c_index_{m}": 0.5 + 0.02 * epoch for m in NOISE} | {"nll_pathology": 1.6 - 0.01 * epoch}
            lines.append({**common, "split": "val", **c})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "method": "ghanet",
        "task": "OS",
        "loss": {"rec_weight": weight},
        "survival": {"bins_from": "cohort", "monitor": "c_index"},
        "early_stop": {"enabled": True},
    }
    (directory / "config.json").write_text(json.dumps(config))
    manifest = {
        **facts,
        "method": "ghanet",
        "task": "OS",
        "dataset": "simulated",
        "split_protocol": "published" if published else "corrected",
        "cohort": {"n": 180, "n_events": 100, "dropped": {"no features": {"n": 2, "ids": ["A", "B"]}}},
    }
    (directory / "run_manifest.json").write_text(json.dumps(manifest))
    if control:
        write_run(
            directory / "control", control=False, weight=0.0, extra_noise=0.8, published=published, cox=cox, folds=folds
        )
    return directory
