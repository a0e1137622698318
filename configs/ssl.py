"""Pre-training of an H&E encoder, without labels, against a privileged view of the same tissue (IHC, IF, mask, genes).

    histokd train --config configs/ssl.py:trident --workdir runs/trident --config.data.dir=PAIRS
    histokd train --config configs/ssl.py:mfl --workdir runs/mfl --config.data.dir=PAIRS
    histokd embed slides/ --coords job --weights runs/trident/fold_0/encoder --out data/mine

Words: mfl (More From Less: image and privileged view), trident (two views of the image and the privileged one; the
default), unprivileged (two views of the image), privileged_only; barlow, infonce (in place of VICReg); vit (in place of
ResNet-50); nct (steps of 128); faithful (as released), corrected (the specification's proposals; neither word: its
defaults); bf16, smoke. Settings: fold=0..|all, seed=N.
"""

from . import common

LAYOUTS = {
    "mfl": "privileged",
    "trident": "trident",
    "unprivileged": "unprivileged",
    "privileged_only": "privileged_only",
}
LOSSES = ("barlow", "infonce")
ENCODER = {
    "kind": "resnet",  # or vit
    "blocks": (3, 4, 6, 3),
    "width": 64,
    "stride_in_3x3": False,  # Keras' version 1: in the first 1x1
    "conv_bias": True,
    "bn_eps": 1.001e-5,
    "bn_momentum": 0.99,
    "kernel_init": "glorot_uniform",
    "patch": 16,  # from here to heads: of the transformer
    "token_width": 384,
    "depth": 12,
    "heads": 6,
    "input": "raw",  # 0..255; or standardised
    "init": "",  # encoder folder to start from; empty: random
}
LOSS = {
    "name": "vicreg",  # or barlow, infonce
    "assembly": "branch_sum",  # or pairwise_original
    "invariance": 25.0,
    "variance": 25.0,
    "covariance": 1.0,
    "gamma": 1.0,
    "eps": 1e-5,
    "ddof": 0,
    "temperature": 0.5,  # of infonce
    "barlow_off_diagonal": 0.005,
    "barlow_branches": "all_pairs",  # or two_only
    "barlow_normalisation": "constant_outside",  # or batch_norm
    "covariance_form": "auto",  # gram where the batch is smaller than the embedding; or direct, gram
    "split_dims": (),  # widths of the chunks of the first embedding, one per further branch
    "reduction": "sum",  # of gradients, which are clipped per array; or mean
    "scope": "global",  # statistics of the loss over the whole step; or per_device
}
AUGMENT = {
    "preset": "a4",  # or one of histokd_jax.ops.image.presets
    "solarise_scale": 1.0,  # 255: thresholds as they were meant
    "brightness": 0.4,  # grey levels; 102: as it was meant
    "noise": "before_rotation",  # or after_rotation
    "shared_geometry": False,
    "privileged": "full",  # or geometric_only, none
    "validation": "augmented",  # or plain
    "gene_update": "permute",  # or none, as released
    "gene_noise": "raw",  # or after_log
}
TRAINING = {
    "train.b": 256,
    "train.lr": 1e-4,
    "train.wd": 0.0,
    "train.optimizer": "adamw",
    "train.lr_schedule": "warmup_cosine",
    "train.max_epochs": 100,
    "split.stratify": False,
    "split.val_fraction": 0.1,
    "early_stop.enabled": False,
    "early_stop.monitor": "loss",
    "compare.control": False,
    "infer.mode": "views",
}
MFL = {"train.b": 128, "train.warmup_fraction": 0.001}
# Part E of the specification, both columns.
FAITHFUL = {
    "loss.reduction": "sum",
    "loss.assembly": "branch_sum",
    "loss.ddof": 0,
    "loss.eps": 1e-5,
    "loss.barlow_off_diagonal": 25.0,
    "loss.barlow_branches": "two_only",
    "loss.scope": "per_device",
    "bn.scope": "per_device",
    "train.nonfinite": "fill",
    "train.lr_first_step": 0,
    "train.optimizer": "keras_adam",
    "augment.solarise_scale": 1.0,
    "augment.brightness": 0.4,
    "augment.noise": "before_rotation",
    "augment.shared_geometry": False,
    "augment.privileged": "full",
    "augment.validation": "augmented",
    "augment.gene_update": "none",
    "augment.gene_noise": "raw",
    "encoder.input": "raw",
    "train_flags.mode": "bn_eval_only",
}
CORRECTED = {
    "loss.reduction": "sum",  # clipped at 1: the direction of the mean clipped at 1/B
    "loss.assembly": "pairwise_original",
    "loss.ddof": 1,
    "loss.eps": 1e-4,
    "loss.barlow_off_diagonal": 0.005,
    "loss.barlow_branches": "all_pairs",
    "loss.scope": "global",
    "bn.scope": "global",
    "train.nonfinite": "skip",
    "train.lr_first_step": 1,
    "train.optimizer": "adamw",
    "augment.solarise_scale": 255.0,
    "augment.brightness": 102.0,
    "augment.noise": "after_rotation",
    "augment.shared_geometry": True,
    "augment.privileged": "geometric_only",
    "augment.validation": "plain",
    "augment.gene_update": "permute",
    "augment.gene_noise": "after_log",
    "encoder.input": "standardised",
    "train_flags.mode": "freeze",
}
# Seconds on two cores, on images of 16 pixels and more.
SMOKE = {
    "encoder.blocks": (1, 1),
    "encoder.width": 4,
    "encoder.patch": 8,
    "encoder.token_width": 16,
    "encoder.depth": 1,
    "encoder.heads": 2,
    "privileged_encoder.widths": (16, 16),
    "projector.widths": (16, 16, 16),
    "train.max_epochs": 2,
    "train.b": 8,
    "split.n_folds": 2,
    "split.val_fraction": 0.25,
    "report.bootstrap": 200,
}
WORDS = (*LAYOUTS, *LOSSES, "vit", "nct", "faithful", "corrected", "bf16", "smoke")


def get_config(arg: str = ""):
    """See the module text; keys and defaults as in parts A to E of the specification of More From Less and TriDeNT."""
    given = common.parse_arg(arg, WORDS, {"fold": common.fold_value, "seed": int})
    layout = _one(given, LAYOUTS, "trident")
    loss = _one(given, LOSSES, "vicreg")
    preset = _one(given, ("faithful", "corrected"), "")
    cfg = common.base()
    cfg.method, cfg.task, cfg.task_kind = "ssl", "pretraining", "representation"
    cfg.seed, cfg.fold = 42, "0"
    _model(cfg)
    common.override(cfg, TRAINING)
    common.override(cfg, MFL if layout == "mfl" else {})
    common.override(cfg, {"faithful": FAITHFUL, "corrected": CORRECTED, "": {}}[preset])
    cfg.layout.name, cfg.loss.name = LAYOUTS[layout], loss
    if "vit" in given:
        cfg.encoder.kind = "vit"
    if "nct" in given:
        cfg.train.b = 128
    if "bf16" in given:
        cfg.train.compute_dtype = "bfloat16"
    if "smoke" in given:
        common.override(cfg, SMOKE)
    for key in ("fold", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _one(given: dict, words, default: str) -> str:
    """The one of some words that was given."""
    found = [word for word in words if word in given]
    if len(found) > 1:
        raise ValueError(f"config argument names {' and '.join(found)}, which contradict each other; give one")
    return found[0] if found else default


def _model(cfg) -> None:
    """Networks, losses and data: the part that only this method reads."""
    common.image_pairs(cfg)
    # encoders, projectors: numbers of the networks of every branch, equal ones share weights, -1: no projector; empty:
    # those of the layout. share_primary=False: both views of the image have networks of their own.
    cfg.layout = dict(name="trident", share_primary=True, encoders=(), projectors=())
    cfg.encoder = dict(ENCODER)
    # kind: auto (as the primary one, or an MLP for vectors) | resnet | vit | mlp. widths: of the MLP.
    cfg.privileged_encoder = dict(kind="auto", widths=(2048, 2048, 2048), init="")
    cfg.projector = dict(widths=(8192, 8192, 8192), bn_eps=1e-3, bn_momentum=0.99, last_bias=True)
    # scope: batch statistics over the whole step, or per_device. mask_missing: absent partners do not enter them.
    cfg.bn = dict(scope="global", mask_missing=True)
    cfg.loss = dict(LOSS)
    # source: real | blank | shuffled | noise.
    cfg.privileged = dict(source="real", blank=128.0)
    cfg.augment = dict(AUGMENT)
    # frozen: networks that are not trained, e.g. encoder_1. mode: freeze | bn_eval_only (only batch norms stand still).
    cfg.train_flags = dict(frozen=(), mode="freeze")
    cfg.export = dict(privileged=False)  # also write the encoder of the privileged view
    cfg.train.warmup_fraction = 0.1  # of all steps
    cfg.train.warmup_start = 0.0
    cfg.train.lr_first_step = 0  # 1: the first update does not have the rate 0
    cfg.train.adam_eps = 1e-7
    cfg.train.clip_per_tensor = 1.0  # largest norm of the gradient of every array; 0: none
    cfg.train.nonfinite = "raise"  # skip: such steps change nothing | fill: NaN gradients become train.nan_fill
    cfg.train.nan_fill = 1e-5
