"""MKD: online distillation from slides and genes to slides alone (ER, PR, HER2 or any class label).

    histokd train --config configs/mkd.py:er,fold=all --workdir runs/er --config.data.dir=DATASET

Words: er, pr, her2 (task), faithful (the authors' quirks), teacher512 (the stronger genomic teacher: one token of the
512 genes ranked by training-fold ANOVA, stronger dropout, 30 fixed epochs), gmkdn (journal variant), smoke, demo.
Settings: fold=all|0..4, task=NAME, seed=N.
"""

from . import common

FAITHFUL = {
    "fidelity": "faithful",
    "data.slide_choice": "listing_order",
    "data.grouping": "random",
    "genes.ranking_scope": "global",
    "split.stratify": False,
    "train.lr_schedule": "cosine50_periodic",
    "ckpt.teachers": "last_epoch",
    "eval.teacher_dropout": True,
}

TEACHER512 = {
    "genes.ranking": "anova",
    "genes.top_k": 512,
    "genes.clip": 5.0,
    "model.gene_dropout": 0.5,
    "model.gene_input_dropout": 0.25,
    "train.lr_schedule": "cosine_to_max_epochs",
    "train.max_epochs": 30,
    # Fixed epochs need no validation part: all of the fold's other patients train.
    "early_stop.enabled": False,
    "split.val_fraction": 0.0,
}

# Small enough for two cores: the cohort that `histokd demo` simulates has 64-d patches and 1,024 genes.
DEMO = {
    "data.feat_dim": 0,
    "genes.top_k": 512,
    "train.max_epochs": 30,
    "train.lr_schedule": "cosine_to_max_epochs",
    "early_stop.patience": 12,
    "train.lr": 5e-4,
    "data.chunk": 512,
    "data.row_multiple": 512,
}

SMOKE = {
    **DEMO,
    "train.max_epochs": 2,
    "train.b": 8,
    "split.n_folds": 2,
    "report.bootstrap": 200,
}


def get_config(arg: str = ""):
    """See the module text; returns a ConfigDict whose keys are those of section 16 of the MKD specification."""
    words = ("er", "pr", "her2", "faithful", "teacher512", "gmkdn", "smoke", "demo")
    given = common.parse_arg(arg, words, {"fold": common.fold_value, "task": str, "seed": int})
    cfg = common.base()
    cfg.method = "mkd"
    _model(cfg)
    for task in ("er", "pr", "her2"):
        if task in given:
            cfg.task = task.upper()
    if "gmkdn" in given:
        # The journal extension: two gene streams, b = 32, patience 10, the student's own AUC as monitor.
        common.override(
            cfg,
            {"variant": "gmkdn", "train.b": 32, "early_stop.patience": 10, "early_stop.monitor": "student_auc"},
        )
    for word, values in (("faithful", FAITHFUL), ("teacher512", TEACHER512), ("demo", DEMO), ("smoke", SMOKE)):
        if word in given:
            common.override(cfg, values)
    for key in ("fold", "task", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _model(cfg) -> None:
    """Networks, losses and genes: the part that only MKD reads."""
    cfg.variant = "mkd"
    cfg.fidelity = "corrected"
    cfg.teachers = ("M", "G")
    cfg.inter_loss = "sp"
    cfg.labels = dict(her2_equivocal="drop")
    cfg.genes = dict(
        top_k=8192,
        token_size=512,
        filter="top",
        ranking="cox",
        ranking_scope="per_fold_train",
        ranking_table="",
        normalisation="precomputed_zscore",
        exclude=(),
        nan_policy="error",
        clip=common.placeholder(float),
    )
    cfg.model = dict(
        d=256,
        attn=128,
        dropout=0.25,
        gene_dropout=common.placeholder(float),  # None: the same as dropout
        gene_input_dropout=0.0,
    )
    cfg.fusion = dict(type="bilinear")
    cfg.init = dict(t_m="torch_default")
    cfg.loss = dict(lambda_coral=1.0, lambda_or=1.0, lambda_skd=1.0, lambda_clod=1.0)
    cfg.mkd = dict(alpha=1.0 / 6.0, or_form="inner_abs_of_mean")
    cfg.skd = dict(scale="b", stop_grad_teacher=False)
    cfg.clod = dict(temperature=4.0)
    cfg.distill = dict(schedule="online")
