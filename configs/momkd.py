"""MoMKD: genes shape two class-conditional memories that persist over the training; slides alone are deployed.

    histokd train --config configs/momkd.py:er,fold=all --workdir runs/momkd --config.data.dir=DATASET

Words: er, pr, her2 (task), faithful (the authors' quirks), paper_hparams (the numbers of the paper), fixed_memory,
ema_memory (how the memories move), baseline (slide alone, plain attention), slide_only (no genes), smoke.
Settings: fold=all|0..4, task=NAME, seed=N. The data set needs patch coordinates.
"""

from . import common

METHOD_FAITHFUL = {
    "fidelity": "faithful",
    "genes.ranking_scope": "global_80pct",
    "labels.missing": "negative",
    "early_stop.patience": 1,
    "early_stop.min_epoch": 1,
    "eval.edgeless": "skip",
    "split.stratify": False,
}

FAITHFUL = {**METHOD_FAITHFUL, "data.slide_choice": "listing_order", "data.grouping": "random"}

PAPER_HPARAMS = {
    "model.d": 256,
    "model.sphere": 128,
    "loss.lambda_rec": 0.01,
    "memory.kmeans_pool": 10_000,
    "attention.learn_temperature": False,
}

BASELINE = {
    "loss.alpha_wsi": 0.0,
    "loss.alpha_gene": 0.0,
    "loss.lambda_rec": 0.0,
    "loss.mem": 0.0,
    "ablate.baseline": True,
}

# Small enough for two cores: the cohort that `histokd demo` simulates has 64-d patches and 1,024 genes.
SMOKE = {
    "data.feat_dim": 0,
    "genes.top_k": 64,
    "genes.ranking": "anova",
    "genes.normalisation": "precomputed_zscore",
    "model.d": 32,
    "model.d_gene": 32,
    "model.gene_hidden": 32,
    "model.sphere": 16,
    "model.codes": 4,
    "memory.kmeans_pool": 2000,
    "train.b": 8,
    "train.max_epochs": 2,
    "split.n_folds": 2,
    "report.bootstrap": 200,
}

PRESETS = {
    "faithful": FAITHFUL,
    "paper_hparams": PAPER_HPARAMS,
    "fixed_memory": {"memory.update_by": "fixed"},
    "ema_memory": {"memory.update_by": "ema"},
    "baseline": BASELINE,
    "slide_only": {"loss.alpha_gene": 0.0, "loss.lambda_rec": 0.0},
    "smoke": SMOKE,
}
TASKS = ("er", "pr", "her2")


def get_config(arg: str = ""):
    """See the module text; returns a ConfigDict with the keys of the specification's sections 2 to 9."""
    given = common.parse_arg(arg, (*TASKS, *PRESETS), {"fold": common.fold_value, "task": str, "seed": int})
    if "fixed_memory" in given and "ema_memory" in given:
        raise ValueError("config words 'fixed_memory' and 'ema_memory' exclude each other")
    cfg = common.base()
    cfg.method = "momkd"
    cfg.task = "HER2"
    _trainer(cfg)
    _model(cfg)
    for task in TASKS:
        if task in given:
            cfg.task = task.upper()
    for word, values in PRESETS.items():
        if word in given:
            common.override(cfg, values)
    for key in ("fold", "task", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _trainer(cfg) -> None:
    """One slide per step (train.b), clipped gradients, a rate that falls on a plateau of the validation AUC."""
    cfg.train.clip_norm = 16.0
    cfg.train.plateau_factor = 0.2
    cfg.train.plateau_patience = 5
    cfg.early_stop.ties_improve = True
    cfg.eval.edgeless = "predict"  # predict | skip: test slides of at most graph.k patches, which have no graph
    cfg.eval.threshold = "val_f1"  # "" | val_f1: decisions at the threshold of the largest F1 on validation as well
    common.override(
        cfg,
        {
            "data.feat_dim": 1536,
            "train.b": 1,
            "train.wd": 1e-4,
            "train.lr_schedule": "plateau",
            "early_stop.monitor": "student_auc",
            "early_stop.patience": 10,
            "early_stop.min_epoch": 10,
        },
    )


def _model(cfg) -> None:
    """Graph, networks, memories, losses and genes: the part that only MoMKD reads."""
    cfg.fidelity = "corrected"
    cfg.graph = dict(k=8, direction="centre_to_neighbour")
    cfg.labels = dict(her2_equivocal="drop", missing="drop")
    cfg.genes = dict(
        kind="ranked",  # ranked | none
        top_k=768,
        token_size=1,
        filter="top",
        ranking="boosted_trees",
        ranking_scope="per_fold_train",  # per_fold_train | global | global_80pct
        ranking_table="",
        normalisation="log2p1_then_zscore_train_fold",
        exclude=(),
        nan_policy="error",
        clip=common.placeholder(float),
    )
    cfg.model = dict(
        d=512,
        d_gene=512,
        gene_hidden=512,
        sphere=64,
        codes=16,
        heads=2,
        head_hidden=128,
        dropout=0.5,
        edge_dropout=0.5,
        head_dropout=0.5,
        gene_dropout=0.25,
    )
    cfg.attention = dict(temperature=0.2, learn_temperature=True, grad_to_memory=False)
    cfg.memory = dict(
        update_by="gradient",  # gradient | ema | fixed
        momentum=0.99,
        renormalise=False,
        weight_decay=True,
        init="kmeans",  # kmeans | random
        kmeans_pool=50_000,
        kmeans_iterations=20,
    )
    cfg.commit = dict(move_codes=False)
    cfg.align = dict(tau=5.0, beta=20.0, margin=0.3)
    cfg.loss = dict(ce=0.5, alpha_wsi=0.2, alpha_gene=0.05, lambda_rec=0.05, mem=0.1, orth=10.0)
    cfg.ablate = dict(baseline=False, baseline_pool="gated_attention")
