"""What distillation buys: the student alone, one term at a time, and all of them.

    histokd sweep --config configs/ablations/hmkd.py --workdir runs/ablations --config.data.dir=PAIRS \
                  --config.distill.teacher=runs/teacher/fold_0/model

Without distill.teacher every setting trains its own teacher first. Words choose families of settings; every other word
goes to configs/hmkd.py (corrected, smoke, ...).
  terms   the student alone, each term alone, all terms
  quirks  every switch between the release and its repair, one at a time
  forms   the softmax as the map itself, maps of both stains, the 128-wide feature
  all     all of them
Without any of these words: terms.
"""

from __future__ import annotations

BASE = "configs/hmkd.py"
REFERENCE = "all_terms"
"""The setting that the others are compared with: the method as published."""

_TERMS = {"kl": "loss.kd_weight", "attention": "loss.at_weight", "cosine": "loss.cos_weight"}


def _only(*terms: str) -> dict:
    return {key: 0.0 for term, key in _TERMS.items() if term not in terms}


FAMILIES = {
    "terms": {"student_alone": _only(), **{f"{term}_only": _only(term) for term in _TERMS}},
    "quirks": {
        "ffn_of_attention_output": {"student.cross_ffn_source": "attn_output"},
        "paired_flips": {"data.flip_mode": "paired"},
        "mean_cosine": {"loss.cos_reduction": "mean", "loss.cos_weight": 16.0},
        "biased_variance": {"norm.running_var": "biased"},
        "decay_of_kernels": {"train.decay_bias": False},
    },
    "forms": {
        "softmax_gate": {"model.attention_gate": "softmax"},
        "maps_of_both_stains": {"loss.at_maps": ("a", "b")},
        "cosine_of_feat": {"loss.cos_feature": "feat"},
    },
}
DEFAULT = ("terms",)


def get_sweep(arg: str = "") -> tuple[str, dict[str, dict]]:
    """(base configuration, setting -> its changes), see the module text."""
    words = [word.strip() for word in arg.split(",") if word.strip()]
    chosen = [word for word in words if word in FAMILIES or word == "all"]
    families = FAMILIES if "all" in chosen else (chosen or DEFAULT)
    rest = ",".join(word for word in words if word not in chosen)
    settings = {REFERENCE: {}}
    for family in families:
        settings |= FAMILIES[family]
    return f"{BASE}:{rest}", settings
