"""Writes synthetic run directories, as a finished training leaves them."""

import json
import pathlib

import numpy as np

from histokd_jax.evals import predictions as P
from histokd_jax.evals import summary as S

STRENGTH = {"pathology": 1.2, "both": 2.4, "genomics": 2.0}


def make_predictions(*, n=120, folds=5, num_classes=2, modes=tuple(STRENGTH), gain=0.0, seed=0, one_patient=False):
    rng = np.random.default_rng(seed)
    label = np.random.default_rng(7).integers(0, num_classes, n)
    shared = np.random.default_rng(8).normal(size=(n, num_classes))
    case = ["p0"] * n if one_patient else [f"TCGA-{i:04d}" for i in range(n)]
    parts = []
    for mode in modes:
        logits = 0.8 * shared + 0.4 * rng.normal(size=(n, num_classes))
        logits[np.arange(n), label] += STRENGTH[mode] + gain * (mode == "pathology")
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        parts.append(
            P.make_predictions(case, [f"slide{i}" for i in range(n)], np.arange(n) % folds, mode, label, probs)
        )
    return P.concatenate(parts)


def write_curves(directory, folds, rng):
    for k in range(folds):
        fold = directory / f"fold_{k}"
        fold.mkdir()
        with (fold / "metrics.jsonl").open("w") as stream:
            for epoch in range(30):
                decay = np.exp(-epoch / 8)
                terms = {"ce_p": 0.7, "ce_m": 0.6, "ce_g": 0.6, "coral": 0.2, "or": 3.0, "skd": 1.0, "clod": 0.5}
                values = {t: v * (0.3 + decay) * rng.uniform(0.9, 1.1) for t, v in terms.items()}
                extra = {
                    "norm_p": 5 - 2 * decay,
                    "norm_m": 8 - decay,
                    "norm_g": 4.0,
                    "acc_p": 0.8,
                    "lr": 1e-4,
                    "grad_norm": 1.0,
                }
                common = {"step": 10 * epoch, "epoch": epoch, "stage": "online"}
                train = {**common, "split": "train", "loss": sum(values.values()), **values, **extra}
                aucs = {
                    f"auroc_{m}": None if epoch == 3 else 0.9 - 0.3 * decay * rng.uniform(0.8, 1.2) for m in STRENGTH
                }
                stream.write(json.dumps(train) + "\n" + json.dumps({**common, "split": "val", **aucs}) + "\n")


def write_run(
    directory, *, control=True, simulated=True, patient_overlap=False, lambdas=1.0, gain=0.9, unit="patient", **options
):
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True)
    test = make_predictions(gain=gain, seed=1 if lambdas else 2, **options)
    num_classes = test.num_classes
    P.write_predictions(directory / "predictions_test.csv", test)
    P.write_predictions(directory / "predictions_val.csv", make_predictions(gain=gain, seed=3, **options))
    S.write_summary(directory / "summary.json", S.summarise(test, num_classes=num_classes, bootstrap=300, unit=unit))
    loss = {f"lambda_{name}": lambdas for name in ("coral", "or", "skd", "clod")}
    config = {
        "method": "mkd",
        "task": "ER",
        "loss": loss,
        "early_stop": {"monitor": "mean_auc3"},
        "train": {"lr": 2e-4},
    }
    (directory / "config.json").write_text(json.dumps(config))
    cohort = {
        "unit": "case",
        "task": "ER",
        "n": len(test) // len(test.modes),
        "classes": {"negative": 50, "positive": 70},
        "n_with_genes": 118,
        "n_without_genes": 2,
        "dropped": {
            "no label": {"n": 12, "ids": [f"TCGA-X{i}" for i in range(12)]},
            "no genes": {"n": 1, "ids": ["TCGA-Y"]},
        },
    }
    manifest = {
        "simulated": simulated,
        "patient_overlap": patient_overlap,
        "dataset": "simulated-brca",
        "method": "mkd",
        "task": "ER",
        "cohort": cohort,
        "versions": {"histokd_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.9"},
        "seed": 0,
        "data_fingerprint": "a" * 64,
        "split_fingerprint": "b" * 64,
        "command": f"histokd train --config.loss.lambda_skd={lambdas}",
    }
    (directory / "run_manifest.json").write_text(json.dumps(manifest))
    write_curves(directory, len(test.folds), np.random.default_rng(0))
    if control:
        write_run(
            directory / "control",
            control=False,
            simulated=simulated,
            patient_overlap=patient_overlap,
            lambdas=0.0,
            gain=0.0,
            unit=unit,
            **options,
        )
    return directory
