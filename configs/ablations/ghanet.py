"""The ablations of G-HANet (section 9 of its specification), for `histokd sweep`.

    histokd sweep --config configs/ablations/ghanet.py:blca --workdir runs/ablations --config.data.dir=DATASET \
                  --config.genes.signatures=signatures.csv

Words choose families of settings; every other word goes to configs/ghanet.py (blca, faithful, smoke, fold=0, ...).
  controls   slides alone: no reconstruction loss, or no associating branch at all; what any benefit must beat
  cab        one pass, the other choice of weights of the second pass, fusion of both branches, detached tokens
  map        morphology, genotype or uniform weights of the pool; the gradient, source and pass of the map
  ratio      patches that the genotype view keeps
  head       hyper-attention layer, self-attention, feed-forward, norm in front, readout
  loss       weight and terms of the reconstruction, power of its cosine term
  genes      all features, the best of every group, without or with correction for many tests
  patches    bags cut to 500 to 4,000 patches in training
  all        all of them
Without any of these words: controls, cab, map, head, loss.

Groups of other genes (pathways, or one group of all) are another file: --config.genes.signatures=FILE with
--config.model.tokens=NUMBER for the whole sweep.
"""

from __future__ import annotations

BASE = "configs/ghanet.py"
REFERENCE = "full"
"""The setting that the others are compared with: the method as configured."""

FAMILIES = {
    "controls": {"without_reconstruction": {"loss.rec_weight": 0.0}, "without_cab": {"cab.enabled": False}},
    "cab": {
        "one_pass": {"cab.passes": 1},
        "second_attention": {"cab.second_attention": "shared"},
        "fusion_none": {"cab.fusion": "none"},
        "fusion_concat": {"cab.fusion": "concat"},
        "detached_tokens": {"cab.detach_tokens": True},
    },
    "map": {
        **{f"map_{name}": {"hsb.map": name} for name in ("morphology", "genotype", "uniform")},
        "map_with_gradient": {"hsb.detach_map": False},
        "map_source": {"hsb.map_source": "raw"},
        "map_of_first_pass": {"hsb.map_pass": "first"},
    },
    "ratio": {f"ratio_{round(100 * r):02d}": {"hsb.ratio": r} for r in (0.05, 0.1, 0.5, 1.0)},
    "head": {
        "without_hyper_layer": {"hsb.hyper_layer": False},
        "without_self_attention": {"hsb.self_attention": False},
        "without_ffn": {"hsb.ffn": False},
        "prenorm": {"hsb.prenorm": True},
        "readout_mean": {"hsb.readout": "mean"},
    },
    "loss": {
        **{f"reconstruction_{round(100 * w):03d}": {"loss.rec_weight": w} for w in (0.1, 0.5, 1.0)},
        **{f"reconstruction_{name}": {"loss.rec_terms": name} for name in ("sce", "mse")},
        **{f"cosine_power_{p}": {"loss.sce_power": float(p)} for p in (1, 2)},
    },
    "genes": {
        "genes_all": {"genes.selection": "none"},
        "genes_top_n": {"genes.selection": "top_n"},
        "genes_correction": {"genes.correction": "none"},
    },
    "patches": {f"patches_{n}": {"data.max_patches_train": n} for n in (500, 1000, 4000)},
}
FAITHFUL = {
    "second_attention": {"cab.second_attention": "own"},
    "map_source": {"hsb.map_source": "prob"},
    "genes_correction": {"genes.correction": "fdr_bh"},
}
"""The other value of what the word `faithful` has set already."""
DEFAULT = ("controls", "cab", "map", "head", "loss")


def get_sweep(arg: str = "") -> tuple[str, dict[str, dict]]:
    """(base configuration, setting -> its changes), see the module text."""
    words = [word.strip() for word in arg.split(",") if word.strip()]
    chosen = [word for word in words if word in FAMILIES or word == "all"]
    families = FAMILIES if "all" in chosen else (chosen or DEFAULT)
    rest = ",".join(word for word in words if word not in chosen)
    settings = {REFERENCE: {}}
    for family in families:
        settings |= FAMILIES[family]
    if "faithful" in words:
        settings |= {name: FAITHFUL[name] for name in settings if name in FAITHFUL}
    return f"{BASE}:{rest}", settings
