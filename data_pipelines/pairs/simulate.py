"""Openly simulated image pairs: the grade is plain in the partner (IHC) and faint in the image (H&E).

Both images of a pair show the same cells (nuclei at the same places). In the IHC image the brown share of the membrane
stain grows with the grade. In the H&E image only the mean size of the nuclei grows with it, a little, under noise. What
a student can learn from H&E alone is therefore bounded by `he_signal`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import tempfile

import numpy as np

from data_pipelines.pairs import pixels
from data_pipelines.pairs.labels import HER2_CLASSES
from data_pipelines.pairs.manifest import PairManifest
from data_pipelines.pairs.plan import Options, make_plan
from data_pipelines.pairs.write import run_import

_HE_STROMA, _HE_NUCLEUS = np.array([228.0, 178.0, 205.0]), np.array([96.0, 62.0, 138.0])
_IHC_STROMA, _IHC_NUCLEUS = np.array([232.0, 230.0, 236.0]), np.array([122.0, 134.0, 180.0])
_IHC_STAIN = np.array([120.0, 74.0, 40.0])


@dataclasses.dataclass(frozen=True)
class PairSpec:
    """What is simulated.

    Attributes:
      n_train, n_test: pairs of the two official parts.
      size: edge of the images in pixels.
      cells: nuclei per 64 x 64 pixels.
      he_signal: growth of the nuclear radius per grade in the H&E image, in standard deviations of its spread between
        images.
      ihc_signal: growth of the share of stain per grade in the IHC image, in the same unit.
      noise: standard deviation of the pixel noise, in grey levels.
      per_group: images of one slide; its images share a tint, and lie in one part.
      seed: of everything that is drawn.
    """

    n_train: int = 64
    n_test: int = 32
    size: int = 64
    cells: int = 6
    he_signal: float = 0.5
    ihc_signal: float = 3.0
    noise: float = 8.0
    per_group: int = 4
    seed: int = 0

    def __post_init__(self):
        for name in ("n_train", "n_test", "cells", "per_group"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a simulation is {getattr(self, name)}; expected >= 1")
        if self.size < 8:
            raise ValueError(f"size of a simulation is {self.size}; expected at least 8 pixels")


def simulate_pairs(directory: str | os.PathLike[str], spec: PairSpec) -> PairManifest:
    """Writes a data set of simulated pairs, by the same way as real ones.

    Args:
      directory: the data set.
      spec: what to simulate.

    Returns:
      Its manifest, which says that it is simulated.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        write_folders(root, spec)
        name = f"simulated pairs, seed {spec.seed}"
        plan = make_plan(root, name, Options(group_regex=r"^s(\d+)_"))
        facts = {**plan.facts, "simulated": True, "simulation": dataclasses.asdict(spec)}
        return run_import(dataclasses.replace(plan, facts=facts), pathlib.Path(directory)).manifest


def write_folders(root: pathlib.Path, spec: PairSpec) -> None:
    """Writes ROOT/{train,test}/{HE,IHC}/sSLIDE_NUMBER_GRADE.png."""
    number = 0
    for part, count in (("train", spec.n_train), ("test", spec.n_test)):
        for stain in ("HE", "IHC"):
            (root / part / stain).mkdir(parents=True)
        for index in range(count):
            slide = f"s{number // spec.per_group:04d}" if part == "train" else f"s9{index // spec.per_group:04d}"
            grade = index % len(HER2_CLASSES)
            image, partner = draw_pair(spec, number, grade)
            name = f"{slide}_{index:05d}_{HER2_CLASSES[grade]}.png"
            (root / part / "HE" / name).write_bytes(pixels.to_png(image))
            (root / part / "IHC" / name).write_bytes(pixels.to_png(partner))
            number += 1


def draw_pair(spec: PairSpec, number: int, grade: int) -> tuple[np.ndarray, np.ndarray]:
    """One pair.

    Args:
      spec: the simulation.
      number: of the pair; seeds its draw.
      grade: 0 to 3.

    Returns:
      (H&E, IHC), each [size, size, 3] uint8.
    """
    rng = np.random.default_rng([spec.seed, number])
    n = max(1, round(spec.cells * (spec.size / 64) ** 2))
    centres = rng.uniform(0, spec.size, (n, 2))
    # Spread between images of equal grade: 0.5 pixels of radius, 0.1 of the share of stain.
    radius = 4.0 + 0.5 * (rng.standard_normal() + spec.he_signal * grade)
    stain = np.clip(0.1 * (1.0 + rng.standard_normal() + spec.ihc_signal * grade), 0.0, 1.0)
    yx = np.stack(np.meshgrid(*2 * [np.arange(spec.size) + 0.5], indexing="ij"), -1)
    distance = np.linalg.norm(yx[:, :, None] - centres, axis=-1).min(axis=2)
    nucleus = _soft(radius - distance)[..., None]
    membrane = (_soft(radius + 2.5 - distance)[..., None] - nucleus) * stain
    image = _HE_STROMA + (_HE_NUCLEUS - _HE_STROMA) * nucleus
    # The size of the nuclei is not to be read off the IHC image, nor its stain off the H&E image.
    partner = _IHC_STROMA + (_IHC_NUCLEUS - _IHC_STROMA) * 0.6 * nucleus
    partner = partner + (_IHC_STAIN - partner) * membrane
    return _noisy(image, spec.noise, rng), _noisy(partner, spec.noise, rng)


def _soft(distance: np.ndarray) -> np.ndarray:
    """1 inside, 0 outside, over about a pixel."""
    return 1.0 / (1.0 + np.exp(-2.0 * np.clip(distance, -20.0, 20.0)))


def _noisy(image: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + noise * rng.standard_normal(image.shape), 0, 255).astype(np.uint8)
