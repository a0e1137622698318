"""Survival distillation: a student that reads slides learns from a teacher that reads genes as well.

    histokd train --config configs/survival_kd.py:abmil,porpoise_mmf,task=OS --workdir runs/kd --config.data.dir=DATASET

Words: the student (deepsets abmil clam_sb clam_mb dsmil transmil), the teacher (snn porpoise_mmf mcat survpath, or
concat or bilinear: ABMIL with late fusion), the schedule (online two_stage cached), cox, smoke. MCAT and SurvPath read
genes in groups: give --config.genes.signatures=FILE. cached reads --config.distill.table=FILE instead of a network.
Settings: fold=all|0..4, task=NAME, seed=N.
"""

from . import common, supervised

NETWORKS = supervised.NETWORKS
STUDENTS = ("deepsets", "abmil", "clam_sb", "clam_mb", "dsmil", "transmil")
TEACHERS = {
    "snn": {"teacher.name": "snn", "loss.teacher_l1": 1e-4},
    "porpoise_mmf": {"teacher.name": "porpoise_mmf"},
    "mcat": {"teacher.name": "mcat", "genes.kind": "groups"},
    "survpath": {"teacher.name": "survpath", "genes.kind": "groups"},
    "concat": {"teacher.name": "abmil", "teacher.abmil.fusion": "concat"},
    "bilinear": {"teacher.name": "abmil", "teacher.abmil.fusion": "bilinear"},
}
SCHEDULES = ("online", "two_stage", "cached")
COX = {"loss.survival": "cox", "loss.lambda_hazard": 0.0, "loss.lambda_order": 1.0}
SMOKE = {
    "data.feat_dim": 0,
    "train.max_epochs": 2,
    "train.b": 8,
    "split.n_folds": 2,
    "report.bootstrap": 200,
}


def get_config(arg: str = ""):
    """See the module text."""
    words = (*STUDENTS, *TEACHERS, *SCHEDULES, "cox", "smoke")
    given = common.parse_arg(arg, words, {"fold": common.fold_value, "task": str, "seed": int})
    cfg = common.base()
    cfg.method = "survival_kd"
    cfg.task, cfg.task_kind = "OS", "survival"
    # Time bins of the cohort: hazards of a teacher that was trained on another fold then mean the same months.
    bins = {"survival.bins_from": "cohort"}
    common.override(cfg, {**supervised.SHARED, **supervised.SURVIVAL, **bins, "compare.control": True})
    _model(cfg)
    cfg.student.name = _one(given, STUDENTS, "student") or "abmil"
    cfg.distill.schedule = _one(given, SCHEDULES, "schedule") or "online"
    teacher = _one(given, tuple(TEACHERS), "teacher")
    if cfg.distill.schedule == "cached":
        if teacher:
            raise ValueError(
                f"config argument {teacher!r}: the schedule 'cached' reads a table, it has no teacher network"
            )
        cfg.genes.kind = "none"
    else:
        common.override(cfg, TEACHERS[teacher or "porpoise_mmf"])
    for word, values in (("cox", COX), ("smoke", SMOKE)):
        if word in given:
            common.override(cfg, values)
    for key in ("fold", "task", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _one(given: dict, words: tuple[str, ...], role: str) -> str | None:
    """The one word of a role, or None."""
    named = [word for word in words if word in given]
    if len(named) > 1:
        raise ValueError(f"config argument names several words for the {role}: {', '.join(named)}; give one")
    return named[0] if named else None


def _model(cfg) -> None:
    """Networks, losses and molecular features: the part that only this method reads."""
    cfg.teacher = dict(name="porpoise_mmf", **NETWORKS)
    cfg.student = dict(name="abmil", **NETWORKS)
    # kind: all (every molecular column, standardised on the fold's training patients) | groups (signatures) | none
    cfg.genes = dict(
        kind="all",
        exclude=(),
        nan_policy="error",
        clip=common.placeholder(float),
        signatures="",
        suffixes=("_mut", "_cnv", "_rnaseq"),
        selection="welch_p05",
        p=0.05,
        select_on="unique_patients",
        correction="fdr_bh",
        empty_group="keep_top_n",
        top_n=10,
    )
    # The terms of both networks, see configs/supervised.py; l1 is the student's.
    cfg.loss = dict(
        survival="nll",
        alpha=0.0,
        clamp="both",
        ties="breslow",
        l1=0.0,
        teacher_l1=0.0,
        l1_scaling="per_bag",
        instance_weight=0.3,
        instance_loss="ce",
        instance_on="uncensored",
        subtyping=True,
        max_weight=0.5,
        lambda_hazard=1.0,  # Bernoulli KL of the hazards, bin by bin
        lambda_event=0.0,  # KL of the distributions of the time of death
        lambda_order=0.0,  # pairwise order of the risks; the only one for cox
    )
    cfg.distill = dict(
        schedule="online",  # online: both at once | two_stage: the teacher first | cached: a table of predictions
        temperature=1.0,
        order_temperature=1.0,
        at_risk=True,  # the hazard term leaves out the bins behind the end of follow-up
        table="",  # of cached: predictions_*.csv of a teacher; {fold} is replaced by the number of the fold
        table_mode="",  # inference mode of its rows; empty: the only one it holds
        teacher_run="",  # run directory of the teacher; empty: the folder of the table
        rows="same_fold",  # same_fold: the teacher of this fold | out_of_sample: one that did not see the patient
        leakage="error",  # error | mark: a teacher that trained on patients this fold is tested on
        allow_missing=False,  # True: training patients that the table lacks learn from their follow-up alone
    )
