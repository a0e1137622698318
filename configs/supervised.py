"""Supervised baselines: one network on slides, molecular features or both; survival (default) or a class label.

    histokd train --config configs/supervised.py:abmil,task=OS --workdir runs/abmil --config.data.dir=DATASET

Words: the network (snn deepsets abmil deepattnmisl clam_sb clam_mb dsmil) or a variant of one (see VARIANTS), survival
or classification, concat or bilinear (late fusion of deepsets, abmil, deepattnmisl), mean (Deep Sets), smoke.
Settings: fold=all|0..4, task=NAME, seed=N. The options of every network are the section model.NAME.
"""

from . import common

DROPOUT = 0.25
# Options of every network with their defaults; the method refuses a configuration without them.
NETWORKS = {
    "snn": dict(widths=(256, 256, 256, 256), dropout=DROPOUT),
    "deepsets": dict(width=512, rho=256, pool="sum", fusion="none", dropout=DROPOUT),
    "abmil": dict(
        width=512, attn=256, rho=256, gated=True, fusion="none", dropout=DROPOUT, init="torch_default"
    ),  # rho=0: none
    "deepattnmisl": dict(clusters=10, width=512, attn=256, rho=256, fusion="none", dropout=DROPOUT),
    "clam_sb": dict(width=512, attn=256, instances=8, gated=True, dropout=DROPOUT),
    "clam_mb": dict(width=512, attn=256, instances=8, gated=True, dropout=DROPOUT),
    "dsmil": dict(query=128, linear_query=False, passing_value=False, dropout=0.0, init="orthogonal"),
}
FUSED = ("deepsets", "abmil", "deepattnmisl")

# One protocol for a fair comparison: fixed epochs, last state, all other patients of the fold train.
SHARED = {
    "train.b": 32,
    "train.lr": 2e-4,
    "train.wd": 1e-5,
    "train.max_epochs": 20,
    "train.lr_schedule": "cosine_to_max_epochs",
    "early_stop.enabled": False,
    "split.val_fraction": 0.0,
    "compare.control": False,
}
# What the authors of a network trained with, where it differs and the task is theirs.
CLASSIFIERS = {
    "clam_sb": {
        "train.lr": 1e-4,
        "train.max_epochs": 200,
        "early_stop.enabled": True,
        "early_stop.patience": 20,
        "early_stop.min_epoch": 50,
        "split.val_fraction": 0.2,
    },
    "dsmil": {
        "train.lr": 1e-4,
        "train.wd": 1e-3,
        "train.max_epochs": 50,
        "early_stop.enabled": True,
        "early_stop.patience": 10,
        "split.val_fraction": 0.2,
        "loss.classification": "bce",
    },
}
CLASSIFIERS["clam_mb"] = CLASSIFIERS["clam_sb"]
RECIPES = {"snn": {"loss.l1": 1e-4}}

VARIANTS = {
    # PORPOISE
    "amil": {"model.name": "abmil", "model.abmil.rho": 0, "model.abmil.init": "xavier_normal"},
    "snn_porpoise": {"model.name": "snn", "loss.l1": 1e-5},
    # A genomic teacher on a par with a ridge Cox model (benchmarks/exp_survival_genes.py): bounded features, every
    # patient once per epoch, risk sets of 64, no L1 term.
    "snn_corrected": {
        "model.name": "snn",
        "genes.clip": 5.0,
        "loss.survival": "cox",
        "loss.l1": 0.0,
        "survival.bins_from": "train_fold",
        # A cohort gives few updates, and the rate falls to 0: 2e-4 leaves the likelihood of time bins undertrained.
        "train.lr": 1e-3,
        "train.b": 64,
        "train.sampler": "uniform",
    },
    # SurvPath
    "abmil_survpath": {"model.name": "abmil", "model.abmil.width": 256, "loss.alpha": 0.5},
    "snn_survpath": {"model.name": "snn", "model.snn.widths": (256, 256), "loss.l1": 0.0, "loss.alpha": 0.5},
    # The large presets
    "snn_big": {"model.name": "snn", "model.snn.widths": (1024, 1024, 1024, 256)},
    "clam_sb_big": {"model.name": "clam_sb", "model.clam_sb.attn": 384},
    "clam_mb_big": {"model.name": "clam_mb", "model.clam_mb.attn": 384},
}

SMOKE = {
    "data.feat_dim": 0,
    "train.max_epochs": 2,
    "train.b": 8,
    "split.n_folds": 2,
    "report.bootstrap": 200,
}


def get_config(arg: str = ""):
    """See the module text."""
    words = (*NETWORKS, *VARIANTS, "survival", "classification", "concat", "bilinear", "mean", "smoke")
    given = common.parse_arg(arg, words, {"fold": common.fold_value, "task": str, "seed": int})
    cfg = common.base()
    cfg.method = "supervised"
    _model(cfg)
    name = _network(given)
    cfg.model.name = name
    cfg.task = "OS"
    cfg.task_kind = "classification" if "classification" in given else "survival"
    common.override(cfg, {**SHARED, **RECIPES.get(name, {})})
    if cfg.task_kind == "classification":
        cfg.task = "ER"
        common.override(cfg, CLASSIFIERS.get(name, {}))
    for word in (*VARIANTS, "smoke"):
        if word in given:
            common.override(cfg, SMOKE if word == "smoke" else VARIANTS[word])
    _inputs(cfg, given)
    for key in ("fold", "task", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _network(given: dict) -> str:
    """The one network that the words name."""
    named = {VARIANTS[word]["model.name"] for word in VARIANTS if word in given}
    named |= {name for name in NETWORKS if name in given}
    if len(named) > 1:
        raise ValueError(f"config argument names several networks: {', '.join(sorted(named))}; give one")
    return named.pop() if named else "abmil"


def _inputs(cfg, given: dict) -> None:
    """What the network reads: late fusion, molecular features, deployment mode."""
    name = cfg.model.name
    for word in ("concat", "bilinear"):
        if word in given:
            if name not in FUSED:
                raise ValueError(f"config argument {word!r}: {name} has no late fusion; only {', '.join(FUSED)} have")
            cfg.model[name].fusion = word
    if "mean" in given:
        if name != "deepsets":
            raise ValueError(f"config argument 'mean' is a choice of deepsets, not of {name}")
        cfg.model.deepsets.pool = "mean"
    fused = name in FUSED and cfg.model[name].fusion != "none"
    cfg.infer.mode = "genomics" if name == "snn" else "both" if fused else "pathology"
    if cfg.infer.mode != "pathology":
        cfg.genes.kind = "all"


def _model(cfg) -> None:
    """Networks, losses and molecular features: the part that only this method reads."""
    cfg.model = dict(name="abmil", **NETWORKS)
    # kind: none | all (every molecular column by name, standardised on the training patients of the fold)
    cfg.genes = dict(kind="none", exclude=(), nan_policy="error", clip=common.placeholder(float))
    cfg.loss = dict(
        classification="ce",  # ce | bce: one-hot, averaged over the classes
        survival="nll",  # nll | ce (time bins) | cox
        alpha=0.0,
        clamp="both",  # of ce: low (as published, can be infinite) | both
        ties="breslow",  # of cox: breslow | efron
        l1=0.0,
        l1_scaling="per_bag",  # per_bag: once per slide of a step, as published | per_update
        instance_weight=0.3,  # CLAM; the bag loss gets the rest
        instance_loss="ce",  # ce | smooth_svm
        instance_on="uncensored",  # uncensored | all: patients whose time bin labels instances
        subtyping=True,
        max_weight=0.5,  # DSMIL; the bag loss gets the rest
    )
    # average_max: DSMIL with bce averages the probabilities of both streams.
    cfg.infer.average_max = False
