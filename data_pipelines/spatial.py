"""Builds a data set of real H&E bags with real expression from the two her2st sections C2 and C3.

One bag per spatial-transcriptomics spot: a grid of real image patches around the spot, each described by a documented
hand-made descriptor (`data_pipelines.descriptors`), with the spot's log-normalised expression as the privileged view
and its expression cluster as the label. Both sections come from one patient, so every split between them is within
one patient, across sections; name and notes of the data set say so.

Data: HER2-positive breast tumours, Andersson et al., Nat. Commun. 2021 (github.com/almaan/her2st). That repository
states no licence: build and measure locally, do not redistribute the result.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines import descriptors
from data_pipelines.errors import DataError
from data_pipelines.genes import GeneTable
from data_pipelines.her2st import IMAGES, Section, open_image, read_section, thin
from data_pipelines.manifest import Manifest
from data_pipelines.table_files import write_csv, write_json
from data_pipelines.tables import write_gene_table
from data_pipelines.writer import DatasetWriter

CASE_ID = "her2st-patient-C"
SPOT_PITCH_UM = 200.0  # centre-to-centre distance of the array (Andersson et al. 2021)
DESCRIPTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"stain_lbp_glcm": descriptors.describe_patches}
STANDARDISE = ("none", "per_section")
_FOLD_COLUMNS = ("train", "train_label", "val", "val_label", "test", "test_label")


def build_her2st(
    source_dir: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    patch_px: int = 64,
    grid: int = 5,
    stride_px: int = 56,
    descriptor: str = "stain_lbp_glcm",
    standardise: str = "none",
    min_spot_fraction: float = 0.1,
    val_fraction: float = 0.2,
    max_spots: int | None = None,
    seed: int = 0,
) -> Manifest:
    """Writes the her2st data set: one bag of H&E patches per spot, tables keyed by spot (slide) id, section folds.

    Args:
      source_dir: folder with `C2/` and `C3/` as published (image, counts, selection, cluster annotation).
      directory: data set folder to create.
      patch_px: side of a square patch in pixels (64 px are about 44 um).
      grid: patches per side of the grid around a spot; a bag holds grid^2 patches.
      stride_px: distance of neighbouring patches. The defaults cover 288 px, one spot pitch, so that neighbouring
        spots of a regular array share no pixels.
      descriptor: one of `DESCRIPTORS`.
      standardise: "none" (fixed constants only) or "per_section" (zero mean, unit variance of every entry over the
        patches of its section: transductive, since it sees the test section's images; the notes say so).
      min_spot_fraction: genes are kept when expressed in at least this fraction of the spots of each section.
      val_fraction: fraction of the training section's spots that become validation spots.
      max_spots: keep only this many spots per section (evenly spaced); for tests.
      seed: seeds the inner validation draw and the patch permutation.

    Returns:
      The manifest of the finished data set. `build_report.json` beside it lists dropped spots with reasons.

    Raises:
      FileNotFoundError: if a source file is missing.
      DataError: if an option is unknown or out of range, or the source files contradict each other.
    """
    sizes = {"patch_px": (patch_px, 16), "grid": (grid, 1), "stride_px": (stride_px, 1)}
    fractions = {"min_spot_fraction": min_spot_fraction, "val_fraction": val_fraction}
    _check_options(sizes, fractions, descriptor, standardise)
    source, directory = pathlib.Path(source_dir), pathlib.Path(directory)
    reach = ((grid - 1) * stride_px + patch_px) / 2
    sections = [thin(read_section(source, name, reach), max_spots) for name in IMAGES]
    pitch = float(np.mean([s.pitch_px for s in sections]))
    writer = DatasetWriter(
        directory,
        name="her2st_within_one_patient",
        feat_dim=len(descriptors.descriptor_names()),
        seed=seed,
        encoder={"name": f"hand-made:{descriptor}", "licence": "Apache-2.0", "standardise": standardise},
        mpp=SPOT_PITCH_UM / pitch,
        patch_size_level0=patch_px,
        notes=_notes(standardise, min_spot_fraction),
    )
    with writer:
        for section in sections:
            with open_image(source / section.name / IMAGES[section.name]) as opened:
                image = np.asarray(opened.convert("RGB"))
            origins = [patch_origins(centre, patch_px, grid, stride_px) for centre in section.pixels]
            bags = describe_section(image, origins, patch_px, DESCRIPTORS[descriptor], standardise)
            _add_bags(writer, section, bags, origins)
        genes = expression_table(sections, min_spot_fraction)
        _write_tables(directory, sections, genes)
        write_section_folds(directory / "tables" / "splits" / "section_folds", sections, val_fraction, seed)
        write_json(directory / "build_report.json", _report(sections, genes, descriptor, standardise))
    return Manifest.load(directory)


def patch_origins(centre: np.ndarray, patch_px: int, grid: int, stride_px: int) -> np.ndarray:
    """Top-left corners of a grid of patches centred on a spot, row by row.

    Args:
      centre: [2] float (x, y) in pixels.
      patch_px: patch side in pixels.
      grid: patches per side.
      stride_px: distance of neighbouring patches.

    Returns:
      [grid^2, 2] int32 (x, y).
    """
    start = np.rint(np.asarray(centre) - ((grid - 1) * stride_px + patch_px) / 2).astype(np.int32)
    step = np.arange(grid, dtype=np.int32) * stride_px
    y, x = np.meshgrid(step, step, indexing="ij")
    return start + np.stack([x.ravel(), y.ravel()], axis=1)


def expression_table(sections: Sequence[Section], min_spot_fraction: float) -> GeneTable:
    """log(1 + counts per 10,000) of the genes common to all sections and expressed widely enough in each.

    Each spot is normalised by its own total over all genes of its section, before genes are selected.

    Args:
      sections: sections with raw counts.
      min_spot_fraction: least fraction of spots with a count above zero, in every section.

    Returns:
      Table keyed by spot id; genes in alphabetical order; values float32.

    Raises:
      DataError: if a spot has no counts at all or no gene passes.
    """
    names = sorted(set.intersection(*(set(s.counts.columns) for s in sections)))
    keep = np.ones(len(names), bool)
    blocks = []
    for section in sections:
        raw = section.counts[names].to_numpy(np.float64)
        total = section.counts.to_numpy(np.float64).sum(axis=1)
        if not (total > 0).all():
            spot = section.spots[int(np.argmin(total))]
            raise DataError(f"section {section.name}: spot {spot!r} has no counts; expected at least one")
        keep &= (raw > 0).mean(axis=0) >= min_spot_fraction
        blocks.append(np.log1p(raw / total[:, None] * 1e4))
    if not keep.any():
        raise DataError(f"no gene is expressed in {min_spot_fraction:.0%} of the spots of each section; lower it")
    values = np.concatenate(blocks)[:, keep].astype(np.float32)
    genes = tuple(name for name, kept in zip(names, keep) if kept)
    return GeneTable(tuple(i for s in sections for i in s.slide_ids), genes, values)


def write_section_folds(folder: pathlib.Path, sections: Sequence[Section], val_fraction: float, seed: int) -> None:
    """One CSV per fold: train on one section (a random part of it validates), test on the other.

    Args:
      folder: receives `splits_0.csv`, `splits_1.csv`.
      sections: the two sections; fold k trains on section k and tests on the other.
      val_fraction: fraction of the training section's spots drawn, without replacement, for validation.
      seed: seeds the draw.
    """
    for fold, (source, target) in enumerate((sections, sections[::-1])):
        order = np.random.default_rng([seed, fold]).permutation(len(source.spots))
        n_val = max(1, round(val_fraction * len(order)))
        parts = (np.sort(order[n_val:]), np.sort(order[:n_val]), np.arange(len(target.spots)))
        columns = []
        for section, rows in zip((source, source, target), parts):
            columns.append([section.slide_ids[r] for r in rows])
            columns.append([str(section.clusters[r]) for r in rows])
        write_csv(folder / f"splits_{fold}.csv", _FOLD_COLUMNS, itertools.zip_longest(*columns, fillvalue=""))


def _check_options(
    sizes: dict[str, tuple[int, int]], fractions: dict[str, float], descriptor: str, standardise: str
) -> None:
    """`sizes` holds (value, least value) of each integer option."""
    if descriptor not in DESCRIPTORS:
        raise DataError(f"descriptor {descriptor!r} is unknown; expected one of {sorted(DESCRIPTORS)}")
    if standardise not in STANDARDISE:
        raise DataError(f"standardise {standardise!r} is unknown; expected one of {STANDARDISE}")
    for name, (value, low) in sizes.items():
        if value < low:
            raise DataError(f"{name} is {value}; expected at least {low}")
    for name, value in fractions.items():
        if not 0.0 < value < 1.0:
            raise DataError(f"{name} is {value}; expected a fraction between 0 and 1")


def describe_section(
    image: np.ndarray,
    origins: Sequence[np.ndarray],
    patch_px: int,
    describe: Callable[[np.ndarray], np.ndarray],
    standardise: str = "none",
) -> list[np.ndarray]:
    """Descriptors of the patches of all spots of one section.

    Args:
      image: [H, W, 3] uint8.
      origins: per spot, [n, 2] int32 top-left corners (x, y).
      patch_px: patch side in pixels.
      describe: descriptor, [n, P, P, 3] uint8 -> [n, D] float32.
      standardise: one of `STANDARDISE`.

    Returns:
      Per spot, [n, D] float32.
    """
    bags = [describe(cut_patches(image, corners, patch_px)) for corners in origins]
    return standardise_bags(bags) if standardise == "per_section" else bags


def cut_patches(image: np.ndarray, origins: np.ndarray, patch_px: int) -> np.ndarray:
    """Copies square patches out of an image.

    Args:
      image: [H, W, 3] uint8.
      origins: [n, 2] int32 top-left corners (x, y), all windows inside the image.
      patch_px: patch side in pixels.

    Returns:
      [n, patch_px, patch_px, 3] uint8.
    """
    return np.stack([image[y : y + patch_px, x : x + patch_px] for x, y in origins])


def standardise_bags(bags: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Zero mean and unit variance of every descriptor entry over all patches of all given bags.

    Args:
      bags: arrays [n_i, D] of one section.

    Returns:
      Standardised arrays of the same shapes; entries that never vary become 0.
    """
    patches = np.concatenate(bags).astype(np.float64)
    mean, std = patches.mean(axis=0), patches.std(axis=0)
    scale = np.where(std > 1e-6, std, 1.0)
    return [((bag - mean) / scale).astype(np.float32) for bag in bags]


def _add_bags(
    writer: DatasetWriter, section: Section, bags: Sequence[np.ndarray], origins: Sequence[np.ndarray]
) -> None:
    for slide_id, spot, bag, corners in zip(section.slide_ids, section.spots, bags, origins):
        writer.add(slide_id, CASE_ID, bag, corners, source=f"{IMAGES[section.name]} spot {spot}")


def _write_tables(directory: pathlib.Path, sections: Sequence[Section], genes: GeneTable) -> None:
    tables = directory / "tables"
    rows = [
        (slide_id, int(cluster), section.name)
        for section in sections
        for slide_id, cluster in zip(section.slide_ids, section.clusters)
    ]
    write_csv(tables / "labels.csv", ("case_id", "cluster", "section"), rows)
    clusters = sorted({cluster for _, cluster, _ in rows})
    write_json(tables / "label_names.json", {"cluster": {str(c): f"expression cluster {c}" for c in clusters}})
    write_gene_table(genes, tables / "genes.npz")


def _notes(standardise: str, min_spot_fraction: float) -> str:
    scaling = {
        "none": "descriptors scaled by fixed constants only",
        "per_section": "descriptors standardised per section (transductive: uses the test section's images, no labels)",
    }
    return (
        "Real H&E and real expression, within one patient, across sections (her2st C2 and C3): not a test on new "
        f"patients. {scaling[standardise]}. Genes: log1p of counts per 10,000, common to both sections and expressed "
        f"in at least {min_spot_fraction:.0%} of the spots of each. Clusters were derived from expression, so "
        "gene-based accuracy is partly circular. Source states no licence: do not redistribute."
    )


def _report(sections: Sequence[Section], genes: GeneTable, descriptor: str, standardise: str) -> dict:
    return {
        "scope": "within one patient, across sections",
        "descriptor": descriptor,
        "descriptor_names": list(descriptors.descriptor_names()),
        "standardise": standardise,
        "n_genes": len(genes.names),
        "sections": {
            s.name: {
                "n_spots": len(s.spots),
                "pitch_px": round(s.pitch_px, 2),
                "mpp": round(SPOT_PITCH_UM / s.pitch_px, 4),
                "clusters": {str(c): int(n) for c, n in zip(*np.unique(s.clusters, return_counts=True))},
                "dropped": [{"spot": spot, "reason": reason} for spot, reason in s.dropped],
            }
            for s in sections
        },
    }
