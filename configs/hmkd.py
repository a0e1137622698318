"""HM-KD: CoCoFNet learns HER2 grades from H&E and IHC tiles, then teaches a student that reads H&E alone.

    histokd train --config configs/hmkd.py --workdir runs/hmkd --config.data.dir=PAIRS
    histokd train --config configs/hmkd.py:teacher --workdir runs/teacher --config.data.dir=PAIRS
    histokd train --config configs/hmkd.py:kl --workdir runs/kl --config.data.dir=PAIRS \
                  --config.distill.teacher=runs/teacher/fold_0/model

Words: faithful (as released, the default), corrected (paired flips, selection on a validation part, the teacher's FFN
in the student, mean cosine term, no decay of norms and biases), teacher (the first stage alone), student (no
distillation), kl, attention, cosine (these terms only), cached (asks a finished teacher once), bf16, smoke. Settings:
fold=all|0.., task=COLUMN, seed=N.
"""

from . import common

MODEL = {
    "widths": (48, 96, 224, 448),
    "stem_patch": 32,  # 16: finer tokens, 16 times the memory of the first attention maps
    "teacher_depths": (2, 2, 6, 2),
    "student_depths": (2, 2, 2, 2),
    "mlp_ratio": 4,
    "attn_expand": 4,
    "local_reduction": 4,
    "local_kernels": (1, 3, 5, 7),
    "refine_reduction": 8,
    "refine_min": 16,
    "head_hidden": 128,
    "attention_axis": "token",
    "attention_gate": "score_times_softmax",  # or softmax (ablation)
    "bn_eps": 1e-5,
    "bn_update": 0.1,
    "gn_eps": 1e-5,
    "plane_elements": 2**22,  # numbers of one block of an attention plane
    "depthwise": "shifts",  # or grouped: the framework's convolution
    "folded": True,  # False: equal blocks written out, which compiles several times longer
    # A pretrained patch encoder in the place of the random stem: a name of histokd_jax/encoders with changes of its
    # architecture ("image=256 depth=6"), and its weights: a local file, or a folder of this library.
    "encoder": {"name": "", "spec": "", "weights": "", "frozen": True},
}
LOSS = {
    "kd_temperature": 5.0,
    "kd_weight": 1.0,
    "at_weight": 1.0,
    "at_maps": ("a",),  # ("a", "b"): the student's map against both of the teacher
    "cos_weight": 1.0,
    "cos_reduction": "sum",  # or mean
    "cos_feature": "f3",  # or feat
    "class_weights": "none",  # balanced: needs class_counts
    "class_counts": (),
    "scale": 65536.0,  # of gradients in train.compute_dtype = float16
}
TRAINING = {
    "train.optimizer": "sgd",
    "train.betas": (0.9, 0.999),
    "train.lr": 1e-3,
    "train.wd": 5e-4,
    "train.lr_schedule": "cosine_to_max_epochs",
    "train.max_epochs": 30,
    "train.b": 16,
    # The epoch of the best score is kept, training never stops early.
    "early_stop.patience": 1000,
    "early_stop.min_epoch": 0,
    "infer.mode": "he",
}
# As released.
FAITHFUL = {
    "student.cross_ffn_source": "block_input",
    "data.flip_mode": "independent",
    "loss.cos_reduction": "sum",
    "norm.running_var": "unbiased",
    "train.decay_bias": True,
    "split.protocol": "published",
}
CORRECTED = {
    "student.cross_ffn_source": "attn_output",
    "data.flip_mode": "paired",
    "loss.cos_reduction": "mean",
    "loss.cos_weight": 16.0,
    "train.decay_bias": False,
    "split.protocol": "corrected",
    "split.val_fraction": 0.1,
}
TERMS = {"kl": "loss.kd_weight", "attention": "loss.at_weight", "cosine": "loss.cos_weight"}
# Seconds on two cores: images of 64 pixels, grids of 8, 4, 2 and 1.
SMOKE = {
    "model.widths": (32, 40, 48, 64),
    "model.stem_patch": 8,
    "model.teacher_depths": (1, 0, 0, 0),
    "model.student_depths": (1, 0, 0, 0),
    "model.mlp_ratio": 2,
    "model.head_hidden": 16,
    "train.max_epochs": 2,
    "train.b": 8,
    "split.n_folds": 2,
    "split.val_fraction": 0.25,
    "report.bootstrap": 200,
}
WORDS = ("faithful", "corrected", "teacher", "student", *TERMS, "cached", "bf16", "smoke")


def get_config(arg: str = ""):
    """See the module text; keys and defaults as in section 12 of the specification of CoCoFNet and HM-KD."""
    given = common.parse_arg(arg, WORDS, {"fold": common.fold_value, "task": str, "seed": int})
    _refuse_contradictions(given)
    cfg = common.base()
    cfg.method, cfg.seed = "hmkd", 42
    _model(cfg)
    common.override(cfg, TRAINING)
    common.override(cfg, CORRECTED if "corrected" in given else FAITHFUL)
    terms = [word for word in TERMS if word in given]
    if terms or "student" in given:
        common.override(cfg, {key: 0.0 for word, key in TERMS.items() if word not in terms})
    if "teacher" in given:
        common.override(cfg, {"distill.schedule": "teacher_only", "infer.mode": "he+ihc", "compare.control": False})
    if "cached" in given:
        cfg.distill.schedule = "cached"
    if "bf16" in given:
        cfg.train.compute_dtype = "bfloat16"
    if "smoke" in given:
        common.override(cfg, SMOKE)
    for key in ("fold", "task", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg


def _refuse_contradictions(given: dict) -> None:
    """Words of which only one makes sense."""
    alone = ("teacher", "student", *TERMS, "cached")
    for words in (("faithful", "corrected"), ("teacher", "student"), *((w, t) for w in alone[:2] for t in alone[2:])):
        if all(word in given for word in words):
            raise ValueError(f"config argument names {' and '.join(words)}, which contradict each other; give one")


def _model(cfg) -> None:
    """Networks, losses and data: the part that only this method reads."""
    common.image_pairs(cfg)
    cfg.data.flip_mode = "independent"  # paired: both stains alike | none
    # flips: those of flip_mode | in their place a preset of histokd_jax.ops.image.presets, e.g. stain_jitter (flips and
    # quarter turns alike for both stains, stain and colour jitter of the H&E image), mfl_corrected, none
    cfg.data.augment = "flips"
    cfg.model = dict(MODEL)
    cfg.norm = dict(running_var="unbiased")  # or biased
    cfg.student = dict(cross_ffn_source="block_input")  # attn_output: as in the teacher
    cfg.loss = dict(LOSS)
    # two_stage | teacher_only | cached. teacher: model folder of a finished run, in place of the first stage.
    cfg.distill = dict(schedule="two_stage", teacher="")
