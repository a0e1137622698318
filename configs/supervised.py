"""Supervised baselines: one network on slides, molecular features or both; survival (default) or a class label.

    histokd train --config configs/supervised.py:abmil,task=OS --workdir runs/abmil --config.data.dir=DATASET

Words: the network (snn deepsets abmil deepattnmisl clam_sb clam_mb dsmil transmil mcat porpoise_mmf survpath) or a
variant of one (see VARIANTS), survival or classification, concat or bilinear (late fusion of deepsets, abmil,
deepattnmisl; fusion of mcat), mean (Deep Sets), corrected (the default, by name) or published, smoke.
Settings: fold=all|0..4, task=NAME, seed=N. The options of every network are the section model.NAME.

published: survival as MCAT and PORPOISE train every network, or a classifier as its own authors do; survpath,
abmil_survpath and snn_survpath as SurvPath trains them, TransMIL as a classifier with Lookahead around RAdam. What
differs: patients that fill no step of an epoch are left out, where the published code adds their gradients to the next
epoch's first step (SurvPath has no such patients); TransMIL trains in float32, not float16. The scripts of SurvPath
choose rate, decay and epochs per cohort (5e-5 to 1e-3, 1e-5 to 1e-2, 2 to 5): the word takes 2e-4, 1e-4 and 5. Genes
are standardised one by one here, where SurvPath scales all of them to [-1, 1] together.
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
    "transmil": dict(width=512, heads=8, landmarks=256, dropout=0.1, tile=256),
    "mcat": dict(width=256, fusion="concat", dropout=DROPOUT),
    "porpoise_mmf": dict(
        width=256,
        patch_width=512,
        attn=256,
        scale=8,
        gate_path=True,
        gate_omic=True,
        skip=True,
        use_mlp=False,
        dropout=DROPOUT,
        input_dropout=0.1,
    ),
    "survpath": dict(
        width=256, attn=128, hidden=64, dropout=DROPOUT, feed_dropout=0.1, padding="corrected", bag_size=4096
    ),
}
FUSED = ("deepsets", "abmil", "deepattnmisl", "mcat")
# Networks that read genes whatever their options, and how.
GENES = {"snn": "all", "mcat": "groups", "porpoise_mmf": "all", "survpath": "groups"}

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
SURVIVAL = {"data.slide_choice": "all", "survival.bins_from": "train_fold"}
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
RECIPES = {
    "snn": {"loss.l1": 1e-4},
    "porpoise_mmf": {"loss.l1": 1e-5},
    "survpath": {"loss.alpha": 0.5, "data.max_patches_train": 4096},
}

# The word `published`. Both kinds: Adam with L2 in the gradient, constant rate, steps in drawn order.
PUBLISHED = {"train.optimizer": "adam_l2", "train.lr_schedule": "constant", "data.grouping": "random", "seed": 1}
# Balanced over (time bin, censorship), bins of the whole cohort, last epoch, reported part = validation part; the L1
# term, where there is one, counts once per bag.
PUBLISHED_SURVIVAL = {
    **PUBLISHED,
    "survival.bins_from": "cohort",
    "split.protocol": "published",
    "train.sampler": "class_balanced_replacement",
    "loss.l1_scaling": "per_bag",
    "loss.clamp": "low",
}
# SurvPath: one bag per step, of 4,096 patches, zeros where there are fewer; disease-specific survival if the table has
# it (survival.time_column).
PUBLISHED_SURVPATH = {
    **PUBLISHED_SURVIVAL,
    "train.optimizer": "radam",
    "train.lr_schedule": "warmup_cosine",
    "train.lr": 2e-4,
    "train.wd": 1e-4,
    "train.b": 1,
    "train.max_epochs": 5,
    "loss.alpha": 0.5,
    "data.max_patches_train": 4096,
    "model.survpath.padding": "faithful",
}
PUBLISHED_CLASSIFIERS = {
    "clam_sb": PUBLISHED,
    "clam_mb": PUBLISHED,
    "dsmil": {
        **PUBLISHED,
        "train.betas": (0.5, 0.9),
        "train.lr_schedule": "cosine_to_floor",
        "train.lr_floor": 5e-6,
    },
    "transmil": {
        **PUBLISHED,
        "seed": 2021,
        "train.optimizer": "lookahead_radam",
        "train.b": 2,
        "train.max_epochs": 200,
        "early_stop.enabled": True,
        "early_stop.patience": 10,
        "split.val_fraction": 0.2,
    },
}

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
    words = (*words, "corrected", "published")
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
    else:
        common.override(cfg, SURVIVAL)
    for word in VARIANTS:
        if word in given:
            common.override(cfg, VARIANTS[word])
    if "published" in given:
        common.override(cfg, _published(cfg, given))
    if "smoke" in given:
        common.override(cfg, SMOKE)
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


def _published(cfg, given: dict) -> dict:
    """The settings of the word `published`."""
    if "corrected" in given or "snn_corrected" in given:
        raise ValueError("config argument 'published' excludes corrected and snn_corrected: give one")
    name = cfg.model.name
    if cfg.task_kind == "classification":
        if name not in PUBLISHED_CLASSIFIERS:
            known = ", ".join(PUBLISHED_CLASSIFIERS)
            raise ValueError(f"config argument 'published': no recipe of {name} as a classifier; there are {known}")
        return PUBLISHED_CLASSIFIERS[name]
    if name == "survpath" or given.keys() & {"abmil_survpath", "snn_survpath"}:
        return PUBLISHED_SURVPATH
    return PUBLISHED_SURVIVAL


def _inputs(cfg, given: dict) -> None:
    """What the network reads: late fusion, molecular features, deployment mode."""
    name = cfg.model.name
    for word in ("concat", "bilinear"):
        if word in given:
            if name not in FUSED:
                raise ValueError(f"config argument {word!r}: {name} has no such choice; only {', '.join(FUSED)} have")
            cfg.model[name].fusion = word
    if "mean" in given:
        if name != "deepsets":
            raise ValueError(f"config argument 'mean' is a choice of deepsets, not of {name}")
        cfg.model.deepsets.pool = "mean"
    both = name in GENES or (name in FUSED and cfg.model[name].fusion != "none")
    cfg.infer.mode = "genomics" if name == "snn" else "both" if both else "pathology"
    if both:
        cfg.genes.kind = GENES.get(name, "all")


def _model(cfg) -> None:
    """Networks, losses and molecular features: the part that only this method reads."""
    cfg.model = dict(name="abmil", **NETWORKS)
    # kind: none | all (every molecular column by name, standardised on the training patients of the fold) | groups
    # (mcat, survpath: the columns of every group of genes.signatures, without a choice among them by default).
    cfg.genes = dict(kind="none", exclude=(), nan_policy="error", clip=common.placeholder(float))
    cfg.genes.update(
        signatures="",  # CSV with one column of gene symbols per group
        suffixes=("_mut", "_cnv", "_rnaseq"),  # kinds of columns; ("",) for bare symbols
        selection="none",  # none | welch_p05 | top_n, on the training patients of the fold
        p=0.05,
        select_on="unique_patients",
        correction="fdr_bh",
        empty_group="error",  # error | skip_group | keep_top_n
        top_n=10,
    )
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
