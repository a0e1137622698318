"""An openly simulated cohort: bags, genes, labels and survival drawn from one stated generative story.

Every case i has P independent standard-normal programmes z_i; programme 0 is the tumour programme.

  label     y_i = 1 where (z_i0 + label_noise * e_i) / sqrt(1 + label_noise^2) exceeds the quantile that gives the
            wanted prevalence. So the label is decided by the programme up to stated noise.
  genes     x_ig = (loading_g * z_i,p(g) + e_ig) / sqrt(1 + loading_g^2), z-score like. `signal_genes` genes, at random
            places, carry programme 0; half of the others carry a nuisance programme; the rest are noise.
  survival  exponential times with hazard proportional to exp(hazard_log_ratio * z_i0), independent censoring.
  bags      log-normal sizes. A patch is unit normal noise + the centre of its tissue type + the shift of the case's
            site. A case-specific fraction of patches is tumour tissue (Beta with mean `witness_fraction`); only these
            carry signal_patches * s_i along one planted unit direction, where the tissue score s_i has unit variance
            and correlation `tissue_fidelity` with z_i0.

Genes therefore carry information on the label that patches show only weakly: a student that reads patches alone has
something to learn from a teacher that reads genes. Directions are unit vectors, so strengths mean the same at every
width. Draws use one random stream per purpose and one per bag: equal specs give equal bytes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from scipy import stats

from data_pipelines.genes import GeneTable
from data_pipelines.manifest import Manifest
from data_pipelines.simulate_bags import (
    DEMO,
    SimulationSpec,
    bag_sizes,
    draw_bag,
    draw_geometry,
    label_fidelity,
    mix,
    simulated_writer,
    stream,
)
from data_pipelines.table_files import write_csv
from data_pipelines.tables import write_gene_table

__all__ = ["DEMO", "SimulationSpec", "simulate_cohort"]

_NUISANCE_LOADING = 0.6


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """Case-level draws of a simulated cohort (n cases).

    Attributes:
      programmes: [n, P] float64; column 0 is the tumour programme.
      tissue_score: [n] float64, what the tissue shows of the tumour programme.
      label: [n] int32 in {0, 1}.
      time_months: [n] float64 observed time.
      event: [n] int32, 1 = event, 0 = censored.
    """

    programmes: np.ndarray
    tissue_score: np.ndarray
    label: np.ndarray
    time_months: np.ndarray
    event: np.ndarray


def simulate_cohort(directory: str | os.PathLike, spec: SimulationSpec) -> Manifest:
    """Writes a wholly simulated data set with labels, genes and survival; one bag is in memory at a time.

    Args:
      directory: data set folder to create.
      spec: what to simulate.

    Returns:
      The manifest; `simulated` is True and `simulation` holds the spec and the story.
    """
    directory = pathlib.Path(directory)
    cases = case_ids(spec.n_cases)
    latents, geometry, sizes = draw_latents(spec), draw_geometry(spec, 1), bag_sizes(spec, spec.n_cases)
    simulation = {
        "what": "simulated bags, simulated genes, simulated labels, simulated survival",
        "expected_witness_gap": expected_witness_gap(spec),
        "spec": dataclasses.asdict(spec),
    }
    with simulated_writer(directory, spec, "simulated_cohort", simulation) as writer:
        for row, case in enumerate(cases):
            shift = spec.signal_patches * latents.tissue_score[row] * geometry.planted[0]
            bag = draw_bag(spec, geometry, row, int(sizes[row]), shift)
            writer.add(f"{case}-SIMBAG", case, bag.features, bag.coords, source="simulated")
        tables = directory / "tables"
        write_csv(tables / "labels.csv", ("case_id", spec.task), zip(cases, latents.label))
        survival = zip(cases, (f"{t:.2f}" for t in latents.time_months), latents.event)
        write_csv(tables / "survival.csv", ("case_id", "time_months", "event"), survival)
        write_gene_table(draw_genes(spec, latents, cases), tables / "genes.npz")
    return Manifest.load(directory)


def case_ids(n: int) -> tuple[str, ...]:
    """Case ids that say what they are: "SIM-0001", "SIM-0002", ..."""
    return tuple(f"SIM-{i:04d}" for i in range(1, n + 1))


def expected_witness_gap(spec: SimulationSpec) -> float:
    """Expected difference, positive minus negative cases, of the planted projection of an informative patch.

    With a bivariate normal (tissue score, label score) of correlation r = tissue_fidelity / sqrt(1 + label_noise^2)
    and a label that cuts the latter at quantile t, E[s | 1] - E[s | 0] = r phi(t) / (prevalence (1 - prevalence)).

    Args:
      spec: the simulation.

    Returns:
      The gap in units of the patch noise.
    """
    density = stats.norm.pdf(stats.norm.isf(spec.prevalence))
    return float(spec.signal_patches * label_fidelity(spec) * density / (spec.prevalence * (1.0 - spec.prevalence)))


def draw_latents(spec: SimulationSpec) -> Latents:
    """Programmes, tissue scores, labels and survival of all cases.

    Args:
      spec: the simulation.

    Returns:
      The case-level draws.
    """
    n = spec.n_cases
    programmes = stream(spec, "programmes").standard_normal((n, spec.n_programmes))
    tumour = programmes[:, 0]
    noisy = (tumour + spec.label_noise * stream(spec, "label").standard_normal(n)) / math.hypot(1.0, spec.label_noise)
    label = (noisy > stats.norm.isf(spec.prevalence)).astype(np.int32)
    time, event = _draw_survival(spec, tumour)
    score = mix(tumour, stream(spec, "tissue").standard_normal(n), spec.tissue_fidelity)
    return Latents(programmes, score, label, time, event)


def draw_genes(spec: SimulationSpec, latents: Latents, cases: Sequence[str]) -> GeneTable:
    """Expression of all cases (see the module docstring).

    Args:
      spec: the simulation.
      latents: case-level draws.
      cases: case ids, in the order of `latents`.

    Returns:
      The table [n_cases, n_genes] with names "SIMGENE00001", ...
    """
    programme, loading = gene_loadings(spec)
    noise = stream(spec, "genes").standard_normal((len(cases), spec.n_genes), dtype=np.float32)
    signal = latents.programmes.astype(np.float32)[:, programme] * loading
    values = (signal + noise) / np.sqrt(1.0 + loading**2)
    names = tuple(f"SIMGENE{g:05d}" for g in range(1, spec.n_genes + 1))
    return GeneTable(tuple(cases), names, values.astype(np.float32))


def gene_loadings(spec: SimulationSpec) -> tuple[np.ndarray, np.ndarray]:
    """Which programme each gene reads, and how strongly.

    Args:
      spec: the simulation.

    Returns:
      (programme [G] int64, loading [G] float32): `signal_genes` genes read programme 0; the others read a nuisance
      programme with probability one half or, with loading 0, nothing. Signs are random.
    """
    rng = stream(spec, "loadings")
    order = rng.permutation(spec.n_genes)
    programme = rng.integers(min(1, spec.n_programmes - 1), spec.n_programmes, spec.n_genes)
    loading = _NUISANCE_LOADING * (rng.random(spec.n_genes) < 0.5) * (spec.n_programmes > 1)
    programme[order[: spec.signal_genes]] = 0
    loading[order[: spec.signal_genes]] = spec.gene_loading
    sign = rng.choice((-1.0, 1.0), spec.n_genes)
    return programme, (loading * sign).astype(np.float32)


def _draw_survival(spec: SimulationSpec, tumour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = stream(spec, "survival")
    base = math.log(2.0) / spec.median_months
    death = rng.exponential(1.0, len(tumour)) / (base * np.exp(spec.hazard_log_ratio * tumour))
    # Competing exponentials: this rate censors the stated fraction at programme 0.
    censoring = rng.exponential((1.0 - spec.censored) / (spec.censored * base), len(tumour))
    time = np.maximum(np.round(np.minimum(death, censoring), 2), 0.01)
    return time, (death <= censoring).astype(np.int32)
