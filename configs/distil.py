"""Distillation with named terms of the catalogue, from any teacher to a student that reads slides; survival or classes.

    histokd train --config configs/distil.py:abmil,porpoise_mmf,terms=hazard+sp,task=OS --workdir runs/kd \
                  --config.data.dir=DATASET
    histokd train --config configs/distil.py:classification,abmil,concat,terms=kd+rkd,task=ER --workdir runs/er ...

Words: the student (deepsets abmil clam_sb clam_mb dsmil transmil), the teacher (snn porpoise_mmf mcat survpath, concat
or bilinear: ABMIL with late fusion, or slides: ABMIL on slides alone), survival or classification, the schedule (online
two_stage), smoke. MCAT and SurvPath read genes in groups: give --config.genes.signatures=FILE.
Settings: terms=NAME+NAME..., fold=all|0..4, task=NAME, seed=N. Every term named has a section terms.NAME: weight,
schedule (constant linear cosine step gaussian) with steps, start, factor, boundaries, final; layers, connector, width,
teacher_gradient. Options of a loss, such as a temperature, are terms.NAME.options.
"""

from ml_collections import ConfigDict

from . import common, supervised, survival_kd

STUDENTS = survival_kd.STUDENTS
TEACHERS = {**survival_kd.TEACHERS, "slides": {"teacher.name": "abmil"}}
SCHEDULES = ("online", "two_stage")
# Customary weights and options of the catalogue (histokd_jax/losses/catalogue.py), which a test compares with these.
LOGITS = {
    "kd": (0.9, dict(temperature=4.0)),
    "standardised_kd": (0.9, dict(temperature=2.0)),
    "dkd": (1.0, dict(alpha=1.0, beta=8.0, temperature=4.0)),
    "dist": (2.0, dict(beta=1.0, gamma=1.0, temperature=1.0)),
    "generalised": (1.0, dict(imitation=0.5, temperature=2.0)),
    "dml": (1.0, dict(temperature=1.0)),
    "kdcl": (1.0, dict(temperature=2.0, kind="min_logit")),
    "hazard": (1.0, dict(temperature=1.0)),
    "event": (1.0, {}),
}
RELATIONS = {
    "sp": (3000.0, dict(norm="l2")),
    "cc": (1.0, dict(form="kernel_mse", gamma=0.4, degree=2)),
    "rkd": (1.0, dict(distance_weight=25.0, angle_weight=50.0)),
    "pkt": (30000.0, {}),
    "cka": (1.0, dict(kernel="linear", unbiased=False)),
}
# Of one width: a linear connector brings the student's embedding to the teacher's.
FEATURES = {
    "fitnet": (100.0, {}),
    "cosine": (1.0, {}),
    "srd": (1.0, dict(power=4.0)),
    "cc_product": (0.02, {}),
    "vid": (1.0, {}),
    "coral": (1.0, {}),
    "mkd_coral": (1.0, {}),
    "mmd": (1.0, dict(unbiased=False)),
    "infonce": (1.0, dict(temperature=0.07)),
    "infonce_pairs": (1.0, dict(temperature=0.5)),
    "vicreg": (1.0, dict(invariance=25.0, variance=25.0, covariance=1.0, gamma=1.0, form="auto", eps=1e-5, ddof=0)),
    "barlow": (1.0, dict(off_diagonal=0.0051, normalisation="constant_outside")),
}
TERMS = {**LOGITS, **RELATIONS, **FEATURES}


def get_config(arg: str = ""):
    """See the module text."""
    words = (*STUDENTS, *TEACHERS, *SCHEDULES, "survival", "classification", "smoke")
    settings = {"fold": common.fold_value, "task": str, "seed": int, "terms": _terms}
    given = common.parse_arg(arg, words, settings)
    cfg = common.base()
    cfg.method = "distil"
    cls = "classification" in given
    cfg.task, cfg.task_kind = ("ER", "classification") if cls else ("OS", "survival")
    task = {} if cls else {**supervised.SURVIVAL, "survival.bins_from": "cohort"}
    common.override(cfg, {**supervised.SHARED, **task, "compare.control": True})
    survival_kd._model(cfg)
    del cfg.distill
    cfg.distill = dict(schedule=survival_kd._one(given, SCHEDULES, "schedule") or "online")
    cfg.loss = ConfigDict(
        {
            **{k: v for k, v in cfg.loss.to_dict().items() if not k.startswith("lambda_")},
            "classification": "ce",
            "own_weight": 1.0,  # of the student's supervised loss
            "lambda_terms": 1.0,  # of the sum of the terms; 0 in the control arm
        }
    )
    cfg.terms = ConfigDict({name: _section(name) for name in given.get("terms", ("kd",) if cls else ("hazard",))})
    cfg.student.name = survival_kd._one(given, STUDENTS, "student") or "abmil"
    common.override(cfg, TEACHERS[survival_kd._one(given, tuple(TEACHERS), "teacher") or "concat"])
    if "slides" in given:
        cfg.genes.kind = "none"
    if "smoke" in given:
        common.override(cfg, survival_kd.SMOKE)
    for key in ("fold", "task", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _terms(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, text.split("+")))
    unknown = [name for name in names if name not in TERMS]
    if unknown or not names:
        raise ValueError(f"terms={text!r}: expected NAME+NAME... of {', '.join(sorted(TERMS))}")
    return names


def _section(name: str) -> dict:
    """Settings of one term."""
    weight, options = TERMS[name]
    return dict(
        weight=weight,
        schedule="constant",
        steps=0,  # length of linear, cosine and gaussian, in optimizer steps
        start=0,
        factor=0.1,
        boundaries=(),
        final=0.0,
        layers=(),  # "STUDENT>TEACHER" of logits and embedding; empty: what the loss reads
        connector="linear" if name in FEATURES else "",  # linear | mlp | empty
        width=0,  # 0: to the teacher's width; else both sides are mapped to it
        teacher_gradient=False,
        options=options,
    )
