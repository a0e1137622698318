"""Which probes are trained on how many labels, and how."""

from __future__ import annotations

import dataclasses
from typing import Any

from histokd_jax.ops.image import presets
from histokd_jax.probe.clusters import ClusterOptions
from histokd_jax.probe.finetune import FinetuneRecipe
from histokd_jax.probe.knn import UNIFORM, VOTES
from histokd_jax.probe.mlp import CORRECTED, FAITHFUL, MlpRecipe

LINEAR, KNN, MLP, FINETUNE = "linear", "knn", "mlp256", "finetune"
PROBES = (LINEAR, KNN, MLP, FINETUNE)
NONE, LIGHT = "none", "light"
AUGMENTATIONS = {NONE: "none", LIGHT: "geometric_only", FAITHFUL: "mfl_faithful", "a4_corrected": "mfl_corrected"}
"""How training images of `mlp256` are augmented -> preset of images (deviation 14: "faithful" is all of A4)."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything about the probes but the data.

    Attributes:
      probes: of `PROBES`, in the order of the tables.
      fractions: of the labels, largest first.
      seeds: of subsets, initialisations and orders.
      l2: of the linear probe, 1 / C of scikit-learn.
      ks: neighbours.
      votes: "uniform" or "similarity".
      knn_standardise: standardise features before the cosine; needed where units differ between columns.
      head: of `mlp256`.
      augment: of its training images, a key of `AUGMENTATIONS`.
      views: augmented views per image; epoch e sees view e modulo views. 0: one for every epoch.
      tune: of fine-tuning.
      bootstrap: resamples of the intervals.
      clusters: settings of the cluster analysis, or None.
    """

    probes: tuple[str, ...] = (LINEAR, KNN)
    fractions: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0, 1, 2)
    l2: float = 1.0
    ks: tuple[int, ...] = (5, 20)
    votes: str = UNIFORM
    knn_standardise: bool = False
    head: MlpRecipe = MlpRecipe()
    augment: str = NONE
    views: int = 0
    tune: FinetuneRecipe = FinetuneRecipe()
    bootstrap: int = 2000
    clusters: ClusterOptions | None = None

    def __post_init__(self):
        unknown = [name for name in self.probes if name not in PROBES]
        if unknown or not self.probes or len(set(self.probes)) < len(self.probes):
            raise ValueError(f"--probes {','.join(self.probes)}: expected some of {', '.join(PROBES)}, each once")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"--seeds {self.seeds}: expected different whole numbers, e.g. 0,1,2")
        if self.augment not in AUGMENTATIONS or self.votes not in VOTES:
            raise ValueError(
                f"--augment {self.augment} and --votes {self.votes}: choose of {tuple(AUGMENTATIONS)}, {VOTES}"
            )
        if self.augment != NONE and MLP not in self.probes:
            raise ValueError(
                f"--augment {self.augment} is for {MLP}, which --probes {','.join(self.probes)} leaves out"
            )
        if not self.ks or min(self.ks) < 1 or self.l2 <= 0 or self.views < 0 or self.bootstrap < 0:
            raise ValueError(f"k {self.ks}, l2 {self.l2}, views {self.views}, bootstrap {self.bootstrap}: out of range")

    @property
    def n_views(self) -> int:
        """Views that are embedded; 0 without augmentation."""
        return 0 if self.augment == NONE else min(self.views or self.head.epochs, self.head.epochs)

    @property
    def pipeline(self) -> tuple:
        """Augmentation of the training images of `mlp256`."""
        return presets.recipe(AUGMENTATIONS[self.augment]).image

    def facts(self) -> dict[str, Any]:
        """The settings as JSON."""
        found = dataclasses.asdict(dataclasses.replace(self, tune=dataclasses.replace(self.tune, pipeline=())))
        found["tune"]["pipeline"] = [repr(step) for step in self.tune.pipeline]
        return found


def mode_of(probe: str, fraction: float, k: int | None = None) -> str:
    """Name of a probe on a share of the labels in tables and predictions, e.g. "knn5@0.1"."""
    return f"{probe}{k or ''}@{fraction:g}"


def title_of(mode: str) -> str:
    """The same for readers, e.g. "5 nearest neighbours, 10 % of the labels"."""
    probe, _, fraction = mode.partition("@")
    names = {LINEAR: "Linear probe", MLP: "MLP probe (256)", FINETUNE: "Fine-tuned"}
    name = names.get(probe) or f"{probe.removeprefix(KNN)} nearest neighbour{'s' * (probe != 'knn1')}"
    share = "" if float(fraction) == 1 else f", {100 * float(fraction):g} % of the labels"
    return name + share


__all__ = ["AUGMENTATIONS", "CORRECTED", "FAITHFUL", "PROBES", "Settings", "mode_of", "title_of"]
