"""Real genes and real survival (TCGA-BLCA), SIMULATED bags: does reconstructing genes help a slide-only survival model?

    python -m benchmarks.exp_ghanet --data FOLDER [--only ghanet]

Official folds, last epoch on the reported fold. Arms: G-HANet; the same network with `loss.rec_weight = 0` (no gene is
ever read: the control that any benefit must beat); and gated-attention MIL. All predict from bags alone. The bags carry
a planted signal tied to early death and a little of the leading expression components, so the numbers say nothing about
tissue; the networks are narrower than published, to match small bags.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks import experiment as ex
from benchmarks import gene_survival as gs
from data_pipelines.manifest import MANIFEST_FILE
from data_pipelines.simulate import DEMO, SimulationSpec
from data_pipelines.simulate_table import simulate_bags_for_table
from data_pipelines.table_files import write_csv
from histokd_jax.evals import survival_summary
from histokd_jax.evals.survival import resampling
from histokd_jax.evals.survival_predictions import read_survival_predictions

COHORT, TASK, MODE = "blca", "early_death", "pathology"
BAGS = {"tissue_fidelity": 0.7, "feat_dim": 64, "bag_median": 60.0}
TRAINING = (
    "data.feat_dim=0",
    "data.slide_choice=all",
    "data.chunk=512",
    "data.row_multiple=512",
    "split.val_fraction=0.0",
    "survival.bins_from=train_fold",
    "train.b=32",
    "train.lr=5e-4",
    "train.max_epochs=20",
    "train.sampler=uniform",
    "early_stop.enabled=False",
    "compare.control=False",
    "ckpt.every_epochs=100",
)
NARROW = ("model.dim=64", "model.heads=4", "model.head_dim=16")
ARMS = {
    "ghanet": ("configs/ghanet.py:corrected", NARROW),
    "ghanet_no_reconstruction": ("configs/ghanet.py:wsi_only", NARROW),
    "abmil": ("configs/supervised.py:abmil", ("model.abmil.width=64", "model.abmil.attn=32", "model.abmil.rho=64")),
}


def main() -> None:
    """Trains every arm that is not there yet and writes the JSON when all are."""
    parser = ex.parser(__doc__, "exp_ghanet", real_data=True)
    parser.add_argument("--only", nargs="*", choices=tuple(ARMS), default=(), help="arms to train; default: all")
    args = parser.parse_args()
    ex.start(args)
    data = cohort(args)
    for arm in args.only or ARMS:
        train(args, arm, data)
    if args.only:
        print("trained; without --only all arms are compared", file=sys.stderr)
        return
    common.write_result(
        args.out,
        benchmark="exp_ghanet",
        config={
            "bags": {**DEMO.__dict__, **BAGS},
            "training": list(TRAINING),
            "arms": {arm: [spec, *extra] for arm, (spec, extra) in ARMS.items()},
        },
        metrics={},
        derived=({"smoke": True} if args.smoke else {}) | compare(args),
        notes="SIMULATED bags, real genes and overall survival (TCGA-BLCA, official folds, one seed). C-index "
        "(Harrell) from bags alone: mean over folds; paired bootstraps over patients within folds.",
    )


def tables(args):
    """The real table, its signatures and its folds."""
    folder = args.data / "tcga_genomics" / "mcat"
    table = folder / gs.TABLES["mcat"] / f"tcga_{COHORT}_all_clean.csv.zip"
    return table, table.with_name("signatures.csv"), folder / "splits/5foldcv" / f"tcga_{COHORT}"


def cohort(args):
    """The data set of simulated bags for the real cases, written once."""
    target = args.workdir / "cohort"
    if not (target / MANIFEST_FILE).exists():
        patients, labels = gs.read_cohort(args.data, "mcat", COHORT), args.workdir / "labels.csv"
        write_csv(labels, ("case_id", TASK), zip(patients.table.case_id, early_death(patients.time, patients.event)))
        spec = SimulationSpec(**{**DEMO.__dict__, **BAGS})
        simulate_bags_for_table(target, spec, labels_path=labels, genes_path=tables(args)[0], tasks=(TASK,))
    return target


def early_death(time: np.ndarray, event: np.ndarray) -> list[str]:
    """What the bags show: "1" died before the median time of deaths, "0" lived longer, "" was censored before it.

    Args:
      time: [n] months.
      event: [n] bool.

    Returns:
      n cells of a label table.
    """
    middle = np.median(time[event])
    return ["0" if t >= middle else "1" if died else "" for t, died in zip(time, event)]


def train(args, arm: str, data) -> None:
    """One arm on every fold; a finished run is only read."""
    spec, extra = ARMS[arm]
    table, signatures, folds = tables(args)
    keys = [f"data.dir={data}", f"split.dir={folds}", f"fold={'0' if args.smoke else 'all'}", *TRAINING, *extra]
    if spec.startswith("configs/ghanet"):
        keys += [f"data.genes={table}", f"genes.signatures={signatures}"]
    if args.smoke:
        keys += ["train.max_epochs=2"]
    ex.train_run(spec, keys, args.workdir / arm)


def compare(args) -> dict[str, Any]:
    """C-index of every arm, and G-HANet against the others."""
    found = {arm: read_survival_predictions(args.workdir / arm / "predictions_test.csv") for arm in ARMS}
    scores = {}
    for arm, rows in found.items():
        rows = rows.of_mode(MODE)
        metric = resampling.c_index(
            rows.case_id, rows.fold, rows.time_months, rows.event == 1, rows.risk, resamples=ex.BOOTSTRAP
        )
        scores[arm] = {
            "mean": metric.value,
            "std_folds": metric.std,
            "per_fold": list(metric.folds.values()),
            "ci": [metric.interval.low, metric.interval.high],
        }
    paired = {
        f"ghanet - {other}": survival_summary.compare(found["ghanet"], found[other], bootstrap=ex.BOOTSTRAP)["modes"][
            MODE
        ]["metrics"]["c_index"]
        for other in ("ghanet_no_reconstruction", "abmil")
    }
    ex.show("SIMULATED bags", scores | paired)
    return {"c_index": scores, "paired": paired}


if __name__ == "__main__":
    main()
