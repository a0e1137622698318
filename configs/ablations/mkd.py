"""The ablations of MKD (section 10.1 of its specification), for `histokd sweep`.

    histokd sweep --config configs/ablations/mkd.py:er --workdir runs/ablations --config.data.dir=DATASET

Words choose families of settings; every other word goes to configs/mkd.py (er, pr, her2, demo, fold=0, ...).
  terms        each term of the loss left out, MKD (both of its terms) left out, and no distillation at all
  fusion       concatenation instead of the bilinear fusion
  genes        512 to 17,920 genes instead of 8,192
  filter       the genes ranked last, or random ones
  alpha        the factor inside the orthogonality term
  temperature  of the mutual learning
  batch        8 or 32 slides per step
  teachers     one teacher only
  schedule     teachers first, then frozen
  losses       another loss between student and teachers in place of SKD
  all          all of them
Without any of these words: terms, fusion, genes, filter, alpha, temperature, the switches of the authors' own code.
"""

from __future__ import annotations

BASE = "configs/mkd.py"
REFERENCE = "full"
"""The setting that the others are compared with: the method as published."""

_LAMBDAS = {name: f"loss.lambda_{name}" for name in ("coral", "or", "skd", "clod")}

FAMILIES = {
    "terms": {
        "without_mkd": {_LAMBDAS["coral"]: 0.0, _LAMBDAS["or"]: 0.0},
        **{f"without_{name}": {key: 0.0} for name, key in _LAMBDAS.items()},
        "no_distillation": dict.fromkeys(_LAMBDAS.values(), 0.0),
    },
    "fusion": {"fusion_concat": {"fusion.type": "concat"}},
    "genes": {f"genes_{k}": {"genes.top_k": k} for k in (512, 1024, 2048, 4096, 17920)},
    "filter": {f"genes_{name}": {"genes.filter": name} for name in ("bottom", "random")},
    "alpha": {"alpha_half": {"mkd.alpha": 0.5}, "alpha_one": {"mkd.alpha": 1.0}},
    "temperature": {f"temperature_{t}": {"clod.temperature": float(t)} for t in (2, 6, 8)},
    "batch": {f"batch_{b}": {"train.b": b} for b in (8, 32)},
    "teachers": {"teacher_m": {"teachers": ("M",)}, "teacher_g": {"teachers": ("G",)}},
    "schedule": {"two_stage": {"distill.schedule": "two_stage"}},
    "losses": {f"inter_{name}": {"inter_loss": name} for name in ("rkd", "pkt", "fitnet", "infonce")},
}
DEFAULT = ("terms", "fusion", "genes", "filter", "alpha", "temperature")


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
