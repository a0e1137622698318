"""G-HANet: survival from slides, with functional gene groups as a reconstruction target during training.

    histokd train --config configs/ghanet.py:blca,fold=all --workdir runs/blca --config.data.dir=DATASET \
                  --config.genes.signatures=signatures.csv

Words: blca, brca, gbmlgg, luad, ucec (cohort), faithful (the authors' quirks), corrected (the default, by name),
wsi_only (no reconstruction loss: the control that any benefit must beat), smoke. Settings: fold=all|0..4, seed=N.
"""

from . import common

COHORTS = ("blca", "brca", "gbmlgg", "luad", "ucec")

# What the network and its gene groups read (deviations D1, D4 to D6, D8, D9, D12, D16, D19).
METHOD_FAITHFUL = {
    "fidelity": "faithful",
    "data.metadata": "positional",
    "genes.select_on": "sampler_draw",
    "genes.correction": "none",
    "genes.empty_group": "error",
    "cab.second_attention": "shared",
    "hsb.map_source": "raw",
    "hsb.min_k": 0,
    "loss.ce_clamp": "low",
    "train.remainder": "carry",
}

# What the trainer reads: time bins of the whole cohort (D3), constant rate and L2 in the gradient (section 6), best
# epoch on the reported part (D18).
FAITHFUL = {
    **METHOD_FAITHFUL,
    "survival.bins_from": "cohort",
    "train.lr_schedule": "constant",
    "train.optimizer": "adam_l2",
    "split.protocol": "published",
    "split.stratify": False,
    "early_stop.enabled": True,
    "early_stop.patience": 20,
    "early_stop.min_epoch": 0,
}

# UCEC has copy number only (D27): groups of a handful of features, of which some keep none in most folds (D6).
UCEC = {"genes.empty_group": "keep_top_n", "genes.top_n": 3}

SMOKE = {
    "data.feat_dim": 0,
    "model.dim": 32,
    "model.heads": 2,
    "model.head_dim": 8,
    "model.ffn_mult": 1,
    "train.max_epochs": 2,
    "train.b": 8,
    "split.n_folds": 2,
    "report.bootstrap": 200,
}


def get_config(arg: str = ""):
    """See the module text; returns a ConfigDict with the keys of the specification's sections 9, 11 and 12."""
    words = (*COHORTS, "faithful", "corrected", "wsi_only", "smoke")
    given = common.parse_arg(arg, words, {"fold": common.fold_value, "seed": int})
    if "faithful" in given and "corrected" in given:
        raise ValueError("config words 'faithful' and 'corrected' exclude each other")
    cfg = common.base()
    cfg.method = "ghanet"
    cfg.task_kind = "survival"
    cfg.task = "OS"
    _trainer(cfg)
    _model(cfg)
    for word in COHORTS:
        if word in given:
            cfg.task = f"OS_{word.upper()}"
    if "faithful" in given:
        common.override(cfg, FAITHFUL)
    if "ucec" in given and "faithful" not in given:
        common.override(cfg, UCEC)
    if "wsi_only" in given:
        common.override(cfg, {"loss.rec_weight": 0.0})
    if "smoke" in given:
        common.override(cfg, SMOKE)
    for key in ("fold", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _trainer(cfg) -> None:
    """All slides of a patient as one bag, windows of 32 patients, 20 epochs, the last one counts."""
    common.override(
        cfg,
        {
            "seed": 1,
            "data.slide_choice": "all",
            "data.grouping": "random",
            "survival.bins_from": "train_fold",
            "train.b": 32,
            "train.lr": 2e-4,
            "train.wd": 1e-5,
            "train.max_epochs": 20,
            "train.lr_schedule": "cosine_to_max_epochs",
            # Fixed epochs need no validation part: all of the fold's other patients train.
            "early_stop.enabled": False,
            "split.val_fraction": 0.0,
        },
    )
    # Patients that do not fill a window: drop | flush_scaled | carry, into the first step of the next epoch (D19).
    cfg.train.remainder = "drop"


def _model(cfg) -> None:
    """Networks, losses and gene groups: the part that only G-HANet reads."""
    cfg.fidelity = "corrected"
    cfg.data.metadata = "by_name"
    cfg.genes = dict(
        kind="groups",
        signatures="",  # CSV with one column of gene symbols per group
        suffixes=("_mut", "_cnv", "_rnaseq"),  # kinds of columns; ("",) for bare symbols
        selection="welch_p05",
        p=0.05,
        select_on="unique_patients",
        correction="fdr_bh",
        empty_group="keep_top_n",
        top_n=10,
        clip=common.placeholder(float),
    )
    cfg.model = dict(dim=512, heads=4, head_dim=128, ffn_mult=4, tokens=6, dropout=0.25)
    cfg.cab = dict(enabled=True, passes=2, second_attention="own", fusion="mean", detach_tokens=False)
    cfg.hsb = dict(
        map="both",
        ratio=0.2,
        min_k=1,
        detach_map=True,
        map_source="prob",
        map_pass="last",
        hyper_layer=True,
        self_attention=True,
        ffn=True,
        prenorm=False,
        readout="flatten",
    )
    cfg.loss = dict(survival="nll", alpha=0.0, ce_clamp="both", rec_weight=0.3, rec_terms="sce+mse", sce_power=3.0)
