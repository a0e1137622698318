"""Real genes and survival (TCGA-BLCA), SIMULATED bags: what does a student of slides learn from teachers with genes?

    python -m benchmarks.exp_survival_kd --data FOLDER [--only mcat] [--seeds 0,1,2]

Official folds, fixed epochs, the last state on the reported fold. Arms: gated-attention MIL on bags alone, and the same
student, with the same start, draws and dropout, beside a teacher that also reads genes: ABMIL with concatenation, MCAT,
PORPOISE (`survival_kd`, online, its default weights; genes clipped at 5 standard deviations, because single values of
this table reach the thousands). The teachers' own C-index is given as well. Differences are paired over patients, folds
and seeds. The bags are those of `exp_ghanet`, so the numbers say nothing about tissue; networks are narrower than
published, to match small bags. A killed run continues with the arm and fold it had reached. About a quarter of an hour
on two cores with three seeds.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import common, exp_ghanet
from benchmarks import experiment as ex
from histokd_jax.evals import ablation, survival_summary
from histokd_jax.evals.survival_predictions import SurvivalPredictions, read_survival_predictions
from histokd_jax.tasks import get_task
from histokd_jax.utils import config

ALONE, STUDENT, TEACHER = "alone", "pathology", "both"
SEEDS = (0, 1, 2)
WIDTHS = {"width": 64, "attn": 32, "rho": 64}
TRAINING = (*exp_ghanet.TRAINING, "train.lr_schedule=cosine_to_max_epochs")
GENES = ("genes.clip=5.0",)
ARMS = {
    ALONE: ("configs/supervised.py:abmil", tuple(f"model.abmil.{key}={value}" for key, value in WIDTHS.items())),
    "concat": ("configs/survival_kd.py:abmil,concat", tuple(f"teacher.abmil.{k}={v}" for k, v in WIDTHS.items())),
    "mcat": ("configs/survival_kd.py:abmil,mcat", ("teacher.mcat.width=64",)),
    "porpoise": (
        "configs/survival_kd.py:abmil,porpoise_mmf",
        (
            "teacher.porpoise_mmf.width=64",
            "teacher.porpoise_mmf.patch_width=64",
            "teacher.porpoise_mmf.attn=32",
            "loss.teacher_l1=1e-5",
        ),
    ),
}


def main() -> None:
    """Trains every arm and seed that is not there yet and writes the JSON when all are."""
    parser = ex.parser(__doc__, "exp_survival_kd", real_data=True)
    parser.add_argument("--only", nargs="*", choices=tuple(ARMS), default=(), help="arms to train; default: all")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: 0,1,2")
    args = parser.parse_args()
    ex.start(args)
    seeds = (0,) if args.smoke else tuple(int(text) for text in args.seeds.split(","))
    data = exp_ghanet.cohort(args)
    for seed in seeds:
        for arm in args.only or ARMS:
            spec, _ = ARMS[arm]
            ex.train_run(spec, overrides(args, arm, seed, data), directory(args, arm, seed))
    if args.only:
        print("trained; without --only all arms are compared", file=sys.stderr)
        return
    common.write_result(
        args.out,
        benchmark="exp_survival_kd",
        config={
            "training": list(TRAINING),
            "arms": {arm: [spec, *extra] for arm, (spec, extra) in ARMS.items()},
            "genes": list(GENES),
            "seeds": list(seeds),
            "bags": exp_ghanet.BAGS,
        },
        metrics={},
        derived=({"smoke": True} if args.smoke else {}) | compare(args, seeds),
        notes="SIMULATED bags, real genes and overall survival (TCGA-BLCA, official folds). Student: bags alone. "
        "C-index (Harrell): mean over folds and seeds; bootstraps over patients within folds, paired with the student "
        "alone.",
    )


def directory(args, arm: str, seed: int) -> pathlib.Path:
    """The run directory of an arm."""
    return args.workdir / f"seed_{seed}" / arm


def overrides(args, arm: str, seed: int, data: pathlib.Path) -> list[str]:
    """Settings of one run."""
    _, extra = ARMS[arm]
    table, signatures, folds = exp_ghanet.tables(args)
    keys = [f"data.dir={data}", f"split.dir={folds}", f"fold={'0' if args.smoke else 'all'}", f"seed={seed}"]
    keys += [*TRAINING, *extra]
    if arm != ALONE:
        keys += [*(f"student.abmil.{key}={value}" for key, value in WIDTHS.items()), *GENES, f"data.genes={table}"]
    if arm == "mcat":
        keys += [f"genes.signatures={signatures}"]
    if args.smoke:
        keys += ["train.max_epochs=2"]
    return keys


def read(args, arm: str, seed: int) -> SurvivalPredictions:
    """The predictions of a finished run, all folds and modes."""
    return read_survival_predictions(directory(args, arm, seed) / "predictions_test.csv")


def compare(args, seeds: Sequence[int]) -> dict[str, Any]:
    """C-index of every student and teacher, each student against the one alone, and the other metrics of a seed."""
    tables = {arm: {seed: read(args, arm, seed) for seed in seeds} for arm in ARMS}
    runs = {
        arm: {(seed, k): rows.where(rows.fold == k) for seed, rows in found.items() for k in rows.folds}
        for arm, found in tables.items()
    }
    table = ablation.ablation_table(runs, ALONE, bootstrap=ex.BOOTSTRAP, measure=survival_summary.MEASURE)
    students = [row for row in table["rows"] if row["mode"] == STUDENT]
    teachers = [row for row in table["rows"] if row["mode"] == TEACHER]
    for row in students:
        difference = (
            "" if row["difference"] is None else f"  difference {row['difference']:+.3f} {row['difference_ci']}"
        )
        print(f"SIMULATED bags  student {row['setting']:10s} {row['mean']:.3f} {row['ci']}{difference}")
    first = {arm: found[seeds[0]].of_mode(STUDENT) for arm, found in tables.items()}
    others = {
        f"{arm} - {ALONE}": survival_summary.compare(
            rows, first[ALONE], reference=_references(args, seeds[0], rows.folds), bootstrap=ex.BOOTSTRAP
        )["modes"][STUDENT]["metrics"]
        for arm, rows in first.items()
        if arm != ALONE
    }
    return {"how": table["how"], "students": students, "teachers": teachers, "all_metrics_of_first_seed": others}


def _references(args, seed: int, folds: Sequence[int]) -> Any:
    workdir = directory(args, ALONE, seed)
    return get_task(config.from_json((workdir / "config.json").read_text())).read_reference(workdir, folds)


if __name__ == "__main__":
    main()
