"""Real images and real genes: expression clusters of two HER2-positive breast sections, WITHIN ONE PATIENT.

    python -m benchmarks.exp_her2st --data FOLDER

One bag per spot: 25 H&E patches around it, each described by stain-channel moments, LBP and co-occurrence. MKD trains
on section C2 and is tested on C3, and the reverse (both are the same patient, so the split is accepted only with
`data.allow_patient_overlap` and every output says so). Seven clusters, genes ranked by ANOVA on training spots.
Compared: the student on images alone, with and without distillation, teachers, logistic regressions, majority; 5 seeds.
"""

from __future__ import annotations

import numpy as np

from benchmarks import common
from benchmarks import experiment as ex
from data_pipelines.manifest import MANIFEST_FILE
from data_pipelines.reader import BagReader
from data_pipelines.spatial import build_her2st
from histokd_jax.evals import bootstrap
from histokd_jax.train.experiment import load_experiment
from histokd_jax.utils import config

METRICS = ("auroc", "balanced_accuracy", "accuracy")
STANDARDISE = ("none", "per_section")
TRAINING = (
    "data.unit=slide",
    "data.allow_patient_overlap=True",
    "data.feat_dim=0",
    "data.chunk=256",
    "data.row_multiple=256",
    "genes.ranking=anova",
    "genes.top_k=512",
    "genes.token_size=128",
    *ex.SHORT_TRAINING,
)


def main() -> None:
    """Builds the data sets, trains 5 seeds x 2 directions x 2 arms, writes the JSON."""
    args = ex.parser(__doc__, "exp_her2st", real_data=True).parse_args()
    ex.start(args)
    seeds = range(1 if args.smoke else 5)
    derived = {}
    for standardise in STANDARDISE[:1] if args.smoke else STANDARDISE:
        data = args.workdir / f"cohort_{standardise}"
        if not (data / MANIFEST_FILE).exists():
            build_her2st(args.data / "spatial" / "her2st", data, standardise=standardise)
        derived[standardise] = one_input(data, args, seeds, standardise)
    common.write_result(
        args.out,
        benchmark="exp_her2st",
        config={"training": list(TRAINING), "seeds": len(seeds), "standardise": list(STANDARDISE)},
        metrics={},
        derived=derived,
        notes="Within one patient, across sections (C2 -> C3 and C3 -> C2), real H&E and real expression. Values are "
        "means over the two directions; intervals are t intervals over seeds. The genes' score is partly circular: the "
        "clusters were made from expression. 'per_section' standardises descriptors within a section (transductive).",
    )


def one_input(data, args, seeds, standardise) -> dict:
    """All seeds and baselines on one version of the descriptors."""
    keys = [f"data.dir={data}", f"split.dir={data}/tables/splits/section_folds", *TRAINING]
    if args.smoke:
        keys += ["train.max_epochs=2", "genes.top_k=128"]
    spec = "configs/mkd.py:task=cluster,fold=all"
    per_seed = []
    for seed in seeds:
        folder = ex.train_run(f"{spec},seed={seed}", keys, args.workdir / f"{standardise}_seed{seed}")
        per_seed.append({"mkd": scores(ex.predictions(folder)), "control": scores(ex.predictions(folder / "control"))})
    found = {
        "student_mkd": over_seeds([s["mkd"]["pathology"] for s in per_seed]),
        "student_control_lambda_0": over_seeds([s["control"]["pathology"] for s in per_seed]),
        "mkd_minus_control": over_seeds(
            [{m: s["mkd"]["pathology"][m] - s["control"]["pathology"][m] for m in METRICS} for s in per_seed]
        ),
        "teacher_both_mkd": over_seeds([s["mkd"]["both"] for s in per_seed]),
        "teacher_genomics_mkd": over_seeds([s["mkd"]["genomics"] for s in per_seed]),
        "baselines": baselines(load_experiment(config.load(spec, keys))),
    }
    for name in ("student_mkd", "student_control_lambda_0", "mkd_minus_control"):
        print(f"{standardise} {name} (within one patient): {found[name]}")
    print(f"{standardise} baselines (within one patient): {found['baselines']}")
    return found


def scores(table) -> dict:
    """mode -> metric -> mean over the two directions."""
    summary = ex.summaries.summarise(table, num_classes=table.num_classes, bootstrap=0, unit="slide")
    return {
        mode: {name: value["metrics"][name]["mean"] for name in METRICS} for mode, value in summary["modes"].items()
    }


def over_seeds(values) -> dict:
    """metric -> mean over seeds with its t interval."""
    out = {}
    for name in METRICS:
        found = bootstrap.paired_t_interval([v[name] for v in values])
        out[name] = {"mean": found.mean, "ci": None if found.reason else [found.low, found.high], "seeds": found.n}
    return out


def baselines(experiment) -> dict:
    """Logistic regressions on mean-pooled descriptors, on their mean and deviation, on the genes; and the majority."""
    reader = BagReader(experiment.manifest)
    bags = [reader.read_bag(int(i))[0].astype(np.float64) for i in experiment.cohort.slide_index]
    mean = np.stack([bag.mean(0) for bag in bags])
    both = np.concatenate([mean, np.stack([bag.std(0) for bag in bags])], axis=1)
    inputs = {"images_mean": mean, "images_mean_std": both, "genes": experiment.cohort.genes.values}
    out = {}
    for name, x in inputs.items():
        table = ex.baseline(experiment, x, ex.logistic_regression(clip=None, costs=(1e-3, 1e-2, 1e-1, 1.0)), name)
        out[f"logistic_{name}"] = scores(table)[name]
    table = ex.baseline(experiment, mean, majority(experiment.num_classes), "majority")
    return {**out, "majority": scores(table)["majority"]}


def majority(num_classes: int):
    """Class frequencies of the training part for every sample."""

    def fit_predict(x, y, test):
        counts = np.bincount(y, minlength=num_classes) / len(y)
        return np.broadcast_to(counts, (len(test), num_classes))

    return fit_predict


if __name__ == "__main__":
    main()
