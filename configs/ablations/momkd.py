"""The ablations of MoMKD (section 8 of its specification), for `histokd sweep`.

    histokd sweep --config configs/ablations/momkd.py:her2 --workdir runs/momkd_ablations --config.data.dir=DATASET

Words choose families of settings; every other word goes to configs/momkd.py (er, pr, her2, smoke, fold=0, ...).
  terms    the slide alone with plain attention, slides aligned alone, genes aligned alone, no reconstruction
  memory   memories that never move, or follow patches as a moving average
  codes    4 or 64 codes per class instead of 16
  graph    messages the other way, or both ways
  all      all of them
Without any of these words: terms and memory.
"""

from __future__ import annotations

BASE = "configs/momkd.py"
REFERENCE = "full"
"""The setting that the others are compared with."""

_GENES_OFF = {"loss.alpha_gene": 0.0, "loss.lambda_rec": 0.0}

FAMILIES = {
    "terms": {
        "slide_baseline": {**_GENES_OFF, "loss.alpha_wsi": 0.0, "loss.mem": 0.0, "ablate.baseline": True},
        "slide_alignment": _GENES_OFF,
        "gene_alignment": {"loss.alpha_wsi": 0.0},
        "without_reconstruction": {"loss.lambda_rec": 0.0},
    },
    "memory": {f"memory_{name}": {"memory.update_by": name} for name in ("fixed", "ema")},
    "codes": {f"codes_{n}": {"model.codes": n} for n in (4, 64)},
    "graph": {f"graph_{name}": {"graph.direction": name} for name in ("neighbour_to_centre", "symmetric")},
}
DEFAULT = ("terms", "memory")


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
