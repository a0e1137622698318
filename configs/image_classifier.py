"""A small convolutional classifier of image pairs: the baseline of what one stain, or both, can tell.

    histokd train --config configs/image_classifier.py:image --workdir runs/he --config.data.dir=DATASET

Words: image (H&E alone, the default), partner (the other stain alone), both, smoke.
Settings: fold=all|0..4, seed=N.
"""

from . import common

INPUTS = ("image", "partner", "both")
SMOKE = {"train.max_epochs": 2, "train.b": 8, "model.widths": (8, 16), "report.bootstrap": 200}


def get_config(arg: str = ""):
    """See the module text."""
    given = common.parse_arg(arg, (*INPUTS, "smoke"), {"fold": common.fold_value, "seed": int})
    named = [word for word in INPUTS if word in given]
    if len(named) > 1:
        raise ValueError(f"config argument names several inputs: {', '.join(named)}; give one")
    cfg = common.base()
    common.image_pairs(cfg)
    cfg.method, cfg.task = "image_classifier", "grade"
    cfg.model = dict(inputs=named[0] if named else "image", widths=(16, 32, 64, 128), norm="group", groups=4)
    common.override(
        cfg,
        {
            "train.b": 16,
            "train.lr": 1e-3,
            "train.wd": 1e-4,
            "train.max_epochs": 30,
            "train.lr_schedule": "cosine_to_max_epochs",
            "early_stop.enabled": False,
            "split.val_fraction": 0.0,
            "compare.control": False,
            "infer.mode": cfg.model.inputs,
        },
    )
    if "smoke" in given:
        common.override(cfg, SMOKE)
    for key in ("fold", "seed"):
        if key in given:
            cfg[key] = given[key]
    return cfg
