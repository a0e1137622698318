"""Simulated bags: the spec that every simulation shares, the geometry of embedding space, and the draw of one bag.

A patch is unit normal noise + the centre of its tissue type + the shift of its case's site. A case-specific fraction of
patches is tumour tissue; only these carry the planted shift of the case. Centres and shifts have stated norms and
planted directions are unit vectors, so strengths mean the same at every embedding width.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from data_pipelines.writer import DatasetWriter

PATCH_PX, MPP = 256, 0.5
# Concentrations of the Beta (tumour content) and Dirichlet (other tissue) distributions over cases.
_TUMOUR_CONCENTRATION, _TISSUE_CONCENTRATION = 10.0, 2.0
_STREAMS = ("programmes", "label", "tissue", "genes", "loadings", "survival", "sizes", "geometry", "bag")


@dataclasses.dataclass(frozen=True)
class SimulationSpec:
    """What to simulate; see `data_pipelines.simulate` for the roles of the numbers.

    Attributes:
      n_cases: number of cases, one slide each.
      feat_dim: embedding width D.
      n_genes: number of genes G.
      bag_median: median patches per bag (log-normal).
      bag_sigma: standard deviation of the logarithm of the bag size; 0 gives bags of equal size.
      bag_min: least bag size.
      bag_max: greatest bag size.
      signal_patches: shift of an informative patch along the planted direction per standard deviation of the tissue
        score, in units of the patch noise; 0 plants nothing.
      witness_fraction: mean fraction of informative (tumour) patches.
      tissue_fidelity: correlation of the tissue score with the tumour programme, 0 to 1.
      signal_genes: number of genes that carry the tumour programme.
      gene_loading: loading of a signal gene, in units of its noise.
      label_noise: standard deviation of the label's noise, in units of the programme.
      prevalence: fraction of positive cases.
      n_programmes: number of programmes including the tumour programme.
      n_tissues: tissue types including tumour.
      tissue_distance: norm of a tissue type's centre, in units of the patch noise.
      n_sites: number of sites (batches).
      site_shift: norm of a site's shift, in units of the patch noise.
      hazard_log_ratio: log hazard ratio per standard deviation of the tumour programme.
      median_months: median survival of a case with programme 0.
      censored: expected fraction of censored cases at programme 0.
      task: column of labels.csv that holds the label.
      seed: seeds everything.
    """

    n_cases: int = 300
    feat_dim: int = 256
    n_genes: int = 2048
    bag_median: float = 500.0
    bag_sigma: float = 0.6
    bag_min: int = 16
    bag_max: int = 20_000
    signal_patches: float = 0.8
    witness_fraction: float = 0.3
    tissue_fidelity: float = 0.85
    signal_genes: int = 128
    gene_loading: float = 0.7
    label_noise: float = 0.3
    prevalence: float = 0.5
    n_programmes: int = 8
    n_tissues: int = 5
    tissue_distance: float = 4.0
    n_sites: int = 4
    site_shift: float = 1.0
    hazard_log_ratio: float = 0.8
    median_months: float = 60.0
    censored: float = 0.5
    task: str = "ER"
    seed: int = 0

    def __post_init__(self):
        _check_at_least(self, 1, "n_cases", "feat_dim", "n_genes", "bag_min", "n_programmes", "n_sites")
        _check_at_least(self, 2, "n_tissues")
        _check_at_least(self, 0, "bag_sigma", "signal_patches", "signal_genes", "gene_loading", "label_noise", "seed")
        _check_at_least(self, 0, "tissue_distance", "site_shift")
        _check_between(self, "witness_fraction", "prevalence", "censored")
        if not 0.0 <= self.tissue_fidelity <= 1.0:
            raise ValueError(f"tissue_fidelity is {self.tissue_fidelity}; expected 0 to 1")
        if not self.bag_min <= self.bag_median <= self.bag_max:
            raise ValueError(
                f"bag_min={self.bag_min}, bag_median={self.bag_median}, bag_max={self.bag_max}: expected this order"
            )
        if self.signal_genes > self.n_genes:
            raise ValueError(f"signal_genes={self.signal_genes} exceeds n_genes={self.n_genes}")


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
    """Directions in embedding space, the same for all bags of a cohort.

    Attributes:
      planted: [T, D] float32 orthonormal planted directions.
      tissues: [n_tissues, D] float32 centres; row 0 is tumour.
      sites: [n_sites, D] float32 shifts.
    """

    planted: np.ndarray
    tissues: np.ndarray
    sites: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Bag:
    """One simulated bag.

    Attributes:
      features: [n, D] float32.
      coords: [n, 2] int32 (x, y) in level-0 pixels; patches of one tissue type lie together.
      witness: [n] bool, True where the patch is tumour tissue and hence carries the planted shift.
    """

    features: np.ndarray
    coords: np.ndarray
    witness: np.ndarray


def bag_sizes(spec: SimulationSpec, n: int) -> np.ndarray:
    """Log-normal bag sizes, rounded and clipped to [bag_min, bag_max].

    Args:
      spec: the simulation.
      n: number of bags.

    Returns:
      [n] int64.
    """
    size = spec.bag_median * np.exp(spec.bag_sigma * stream(spec, "sizes").standard_normal(n))
    return np.clip(np.rint(size), spec.bag_min, spec.bag_max).astype(np.int64)


def draw_geometry(spec: SimulationSpec, n_planted: int) -> Geometry:
    """Planted directions, tissue centres and site shifts.

    Args:
      spec: the simulation.
      n_planted: number T of planted directions.

    Returns:
      The geometry.

    Raises:
      ValueError: if feat_dim is smaller than n_planted, so that no orthonormal directions exist.
    """
    if spec.feat_dim < n_planted:
        raise ValueError(f"feat_dim is {spec.feat_dim}; expected at least {n_planted}, one per planted direction")
    rng = stream(spec, "geometry")
    planted = np.linalg.qr(rng.standard_normal((spec.feat_dim, n_planted)))[0].T
    tissues = spec.tissue_distance * _unit_rows(rng.standard_normal((spec.n_tissues, spec.feat_dim)))
    sites = spec.site_shift * _unit_rows(rng.standard_normal((spec.n_sites, spec.feat_dim)))
    return Geometry(planted.astype(np.float32), tissues.astype(np.float32), sites.astype(np.float32))


def draw_bag(spec: SimulationSpec, geometry: Geometry, row: int, n: int, shift: np.ndarray) -> Bag:
    """One bag; depends on nothing but its arguments, so bags can be drawn in any order.

    Args:
      spec: the simulation.
      geometry: directions of the cohort.
      row: number of the case; selects the random stream.
      n: bag size.
      shift: [D] float32 added to every informative patch.

    Returns:
      The bag, ordered by tissue type.
    """
    rng = stream(spec, "bag", row)
    mean = spec.witness_fraction
    tumour = rng.beta(mean * _TUMOUR_CONCENTRATION, (1.0 - mean) * _TUMOUR_CONCENTRATION)
    others = rng.dirichlet(np.full(spec.n_tissues - 1, _TISSUE_CONCENTRATION))
    tissue = np.sort(rng.choice(spec.n_tissues, n, p=np.concatenate([[tumour], (1.0 - tumour) * others])))
    site = rng.integers(spec.n_sites)
    witness = tissue == 0
    features = rng.standard_normal((n, spec.feat_dim), dtype=np.float32)
    features += geometry.tissues[tissue]
    features += geometry.sites[site][None]
    features[witness] += shift[None]
    return Bag(features, _grid_coords(n), witness)


def label_fidelity(spec: SimulationSpec) -> float:
    """Correlation of the tissue score with the noisy score whose threshold is the label."""
    return spec.tissue_fidelity / math.hypot(1.0, spec.label_noise)


def mix(signal: np.ndarray, noise: np.ndarray, fidelity: float) -> np.ndarray:
    """fidelity * signal + sqrt(1 - fidelity^2) * noise: unit variance is kept if both have it."""
    return fidelity * signal + math.sqrt(1.0 - fidelity**2) * noise


def stream(spec: SimulationSpec, purpose: str, *index: int) -> np.random.Generator:
    """Random generator of one purpose; streams of different purposes and indices are independent.

    Args:
      spec: the simulation (its seed counts).
      purpose: one of the purposes listed in this module.
      *index: further integers, such as the number of a bag.

    Returns:
      A fresh generator.
    """
    return np.random.default_rng([spec.seed, _STREAMS.index(purpose), *index])


def simulated_writer(
    directory: pathlib.Path, spec: SimulationSpec, name: str, simulation: dict[str, Any]
) -> DatasetWriter:
    """A writer whose manifest says "simulated" in name, encoder, notes and facts.

    Args:
      directory: data set folder.
      spec: the simulation.
      name: data set name, containing "simulated".
      simulation: facts for `Manifest.simulation`; its entry "what" also becomes the notes.

    Returns:
      The writer, to be used as a context manager.
    """
    return DatasetWriter(
        directory,
        name=name,
        feat_dim=spec.feat_dim,
        seed=spec.seed,
        encoder={"name": "simulated", "licence": "none needed: simulated"},
        mpp=MPP,
        patch_size_level0=PATCH_PX,
        simulated=True,
        simulation=simulation,
        notes=simulation["what"],
    )


def _grid_coords(n: int) -> np.ndarray:
    side = math.ceil(math.sqrt(n))
    index = np.arange(n, dtype=np.int32)
    return np.stack([index % side, index // side], axis=1) * np.int32(PATCH_PX)


def _unit_rows(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _check_at_least(spec: SimulationSpec, low: int, *fields: str) -> None:
    for field in fields:
        if not getattr(spec, field) >= low:
            raise ValueError(f"simulation.{field} is {getattr(spec, field)}; expected at least {low}")


def _check_between(spec: SimulationSpec, *fields: str) -> None:
    for field in fields:
        if not 0.0 < getattr(spec, field) < 1.0:
            raise ValueError(f"simulation.{field} is {getattr(spec, field)}; expected a fraction between 0 and 1")


DEMO = SimulationSpec(n_cases=200, feat_dim=64, n_genes=1024, bag_median=150.0, signal_patches=2.0)
"""A cohort small enough to write in seconds and to train on in minutes on two CPU cores."""
