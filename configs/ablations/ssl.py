"""What every choice of pre-training does to its loss; whether the encoder is better, only a probe of it can say.

    histokd sweep --config configs/ablations/ssl.py --workdir runs/ssl_ablations --config.data.dir=PAIRS

Words choose families of settings; every other word goes to configs/ssl.py (corrected, smoke, ...).
  layouts  the four layouts
  sources  useless privileged views: blank, shuffled, noise
  forms    networks of their own for both primary branches, other losses
  views    augmentation of the privileged view, shared geometry
  all      all of them
Without any of these words: layouts. Losses of settings with another number of branches or another loss cannot be
compared with each other; every setting keeps its encoder folder.
"""

from __future__ import annotations

BASE = "configs/ssl.py"
REFERENCE = "trident"
"""The setting that the others are compared with."""

FAMILIES = {
    "layouts": {
        "unprivileged": {"layout.name": "unprivileged"},
        "privileged": {"layout.name": "privileged"},
        "privileged_only": {"layout.name": "privileged_only"},
    },
    "sources": {f"{source}_view": {"privileged.source": source} for source in ("blank", "shuffled", "noise")},
    "forms": {
        "own_primary_networks": {"layout.share_primary": False},
        "pairwise_original": {"loss.assembly": "pairwise_original"},
        "infonce": {"loss.name": "infonce"},
    },
    "views": {
        "geometry_of_the_privileged_view_only": {"augment.privileged": "geometric_only"},
        "privileged_view_as_it_is": {"augment.privileged": "none"},
        "shared_geometry": {"augment.shared_geometry": True},
    },
}
DEFAULT = ("layouts",)


def get_sweep(arg: str = "") -> tuple[str, dict[str, dict]]:
    """(base configuration, setting -> its changes), see the module text."""
    words = [word.strip() for word in arg.split(",") if word.strip()]
    chosen = [word for word in words if word in FAMILIES or word == "all"]
    families = FAMILIES if "all" in chosen else (chosen or DEFAULT)
    rest = ",".join(word for word in words if word not in chosen)
    settings: dict[str, dict] = {REFERENCE: {}}
    for family in families:
        settings |= FAMILIES[family]
    return f"{BASE}:{rest}", settings
