"""Builds a data set of real H&E bags with real expression from the two her2st sections C2 and C3.

One bag per spatial-transcriptomics spot: a grid of real image patches around the spot, each described by a documented
hand-made descriptor (`data_pipelines.descriptors`), with the spot's log-normalised expression as the privileged view
and its expression cluster as the label. Both sections come from one patient, so every split between them is within
one patient, across sections; name and notes of the data set say so.

Data: HER2-positive breast tumours, Andersson et al., Nat. Commun. 2021 (github.com/almaan/her2st). That repository
states no licence: build and measure locally, do not redistribute the result.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from data_pipelines import descriptors
from data_pipelines.genes import GeneTable, write_gene_table
from data_pipelines.manifest import Manifest
from data_pipelines.writer import DatasetWriter

IMAGES = {"C2": "5714_HE_BT_C2.jpg", "C3": "5714_HE_BT_D1.jpg"}
CASE_ID = "her2st-patient-C"
SPOT_PITCH_UM = 200.0  # centre-to-centre distance of the array (Andersson et al. 2021)
DESCRIPTORS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"stain_lbp_glcm": descriptors.describe_patches}
STANDARDISE = ("none", "per_section")
_FOLD_COLUMNS = ("train", "train_label", "val", "val_label", "test", "test_label")


@dataclasses.dataclass(frozen=True)
class Section:
    """One section: its usable spots and what was left out.

    Attributes:
      name: "C2" or "C3".
      spots: array positions "XxY", sorted as (X, Y).
      pixels: [n, 2] float64 spot centres (x, y) in pixels of the full-resolution image.
      clusters: [n] int32 expression cluster.
      counts: spots x genes, raw counts (index = `spots`).
      dropped: (spot, reason) of every spot that some table names but that cannot be used.
      pitch_px: distance of neighbouring array positions in pixels (least-squares fit over all selected spots).
    """

    name: str
    spots: tuple[str, ...]
    pixels: np.ndarray
    clusters: np.ndarray
    counts: pd.DataFrame
    dropped: tuple[tuple[str, str], ...]
    pitch_px: float

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Slide id of every spot, e.g. "her2st-C2-10x21"."""
        return tuple(f"her2st-{self.name}-{spot}" for spot in self.spots)


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
      ValueError: if an option is unknown or out of range, or the source files contradict each other.
    """
    _check_options(patch_px, grid, stride_px, descriptor, standardise, min_spot_fraction, val_fraction)
    source, directory = pathlib.Path(source_dir), pathlib.Path(directory)
    reach = ((grid - 1) * stride_px + patch_px) / 2
    sections = [_thin(read_section(source, name, reach), max_spots) for name in IMAGES]
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
            _write_section(writer, source, section, patch_px, grid, stride_px, DESCRIPTORS[descriptor], standardise)
        genes = expression_table(sections, min_spot_fraction)
        _write_tables(directory, sections, genes)
        write_section_folds(directory / "tables" / "splits" / "section_folds", sections, val_fraction, seed)
        _write_json(directory / "build_report.json", _report(sections, genes, descriptor, standardise))
    return Manifest.load(directory)


def read_section(source: pathlib.Path, name: str, reach_px: float) -> Section:
    """Joins counts, spot positions and cluster annotation of one section; nothing is dropped without a reason.

    Args:
      source: folder that holds `<name>/`.
      name: "C2" or "C3".
      reach_px: half the side of the image window of a spot; spots whose window leaves the image are dropped.

    Returns:
      The section with its usable spots.

    Raises:
      FileNotFoundError: if a source file is missing.
      ValueError: if a table lacks a column or names a spot twice.
    """
    folder = source / name
    counts = pd.read_csv(_existing(folder / f"{name}.tsv.gz"), sep="\t", index_col=0)
    selection = _by_spot(folder / f"{name}_selection.tsv", ("pixel_x", "pixel_y"))
    annotation = _by_spot(folder / f"{name}-cluster-annotation.tsv.gz", ("label",))
    if counts.index.has_duplicates:
        raise ValueError(f"{folder / f'{name}.tsv.gz'}: spot {_first_duplicate(counts.index)!r} occurs twice")
    width, height = _image_size(_existing(folder / IMAGES[name]))
    usable, dropped = [], []
    for spot in sorted({*counts.index, *selection.index, *annotation.index}, key=_array_position):
        reason = _why_unusable(spot, counts, selection, annotation, (width, height), reach_px)
        dropped.append((spot, reason)) if reason else usable.append(spot)
    return Section(
        name=name,
        spots=tuple(usable),
        pixels=selection.loc[usable, ["pixel_x", "pixel_y"]].to_numpy(np.float64),
        clusters=annotation.loc[usable, "label"].to_numpy(np.int32),
        counts=counts.loc[usable],
        dropped=tuple(dropped),
        pitch_px=spot_pitch(selection),
    )


def spot_pitch(selection: pd.DataFrame) -> float:
    """Distance of neighbouring array positions in pixels: mean slope of pixel position on array index (x and y).

    The median distance to the nearest spot is smaller (271 px against 291 px here), because printed spots scatter
    around the array and a minimum over four neighbours picks the closest one.

    Args:
      selection: columns x, y (array index), pixel_x, pixel_y.

    Returns:
      Pitch in pixels.
    """
    slopes = [np.polyfit(selection[a], selection[f"pixel_{a}"], 1)[0] for a in ("x", "y")]
    return float(np.mean(slopes))


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
      ValueError: if a spot has no counts at all or no gene passes.
    """
    names = sorted(set.intersection(*(set(s.counts.columns) for s in sections)))
    keep = np.ones(len(names), bool)
    blocks = []
    for section in sections:
        raw = section.counts[names].to_numpy(np.float64)
        total = section.counts.to_numpy(np.float64).sum(axis=1)
        if not (total > 0).all():
            spot = section.spots[int(np.argmin(total))]
            raise ValueError(f"section {section.name}: spot {spot!r} has no counts; expected at least one")
        keep &= (raw > 0).mean(axis=0) >= min_spot_fraction
        blocks.append(np.log1p(raw / total[:, None] * 1e4))
    if not keep.any():
        raise ValueError(f"no gene is expressed in {min_spot_fraction:.0%} of the spots of each section; lower it")
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
    folder.mkdir(parents=True, exist_ok=True)
    for fold, (source, target) in enumerate((sections, sections[::-1])):
        order = np.random.default_rng([seed, fold]).permutation(len(source.spots))
        n_val = max(1, round(val_fraction * len(order)))
        parts = (np.sort(order[n_val:]), np.sort(order[:n_val]), np.arange(len(target.spots)))
        columns = []
        for section, rows in zip((source, source, target), parts):
            columns.append([section.slide_ids[r] for r in rows])
            columns.append([str(section.clusters[r]) for r in rows])
        _write_padded(folder / f"splits_{fold}.csv", _FOLD_COLUMNS, columns)


def _check_options(patch_px, grid, stride_px, descriptor, standardise, min_spot_fraction, val_fraction) -> None:
    if descriptor not in DESCRIPTORS:
        raise ValueError(f"descriptor {descriptor!r} is unknown; expected one of {sorted(DESCRIPTORS)}")
    if standardise not in STANDARDISE:
        raise ValueError(f"standardise {standardise!r} is unknown; expected one of {STANDARDISE}")
    for name, value, low in (("patch_px", patch_px, 16), ("grid", grid, 1), ("stride_px", stride_px, 1)):
        if value < low:
            raise ValueError(f"{name} is {value}; expected at least {low}")
    for name, value in (("min_spot_fraction", min_spot_fraction), ("val_fraction", val_fraction)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} is {value}; expected a fraction between 0 and 1")


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the her2st files of sections {sorted(IMAGES)}")
    return path


def _by_spot(path: pathlib.Path, needed: tuple[str, ...]) -> pd.DataFrame:
    """Table with columns x, y and `needed`, indexed by the array position "XxY"."""
    table = pd.read_csv(_existing(path), sep="\t")
    missing = [c for c in ("x", "y", *needed) if c not in table]
    if missing:
        raise ValueError(f"{path}: no column {missing}; found {list(table.columns)}")
    table.index = table["x"].astype(str) + "x" + table["y"].astype(str)
    if table.index.has_duplicates:
        raise ValueError(f"{path}: spot {_first_duplicate(table.index)!r} occurs twice; expected one row per spot")
    return table


def _first_duplicate(index: pd.Index) -> str:
    return index[index.duplicated()][0]


def _array_position(spot: str) -> tuple[int, int]:
    x, y = spot.split("x")
    return int(x), int(y)


def _why_unusable(spot, counts, selection, annotation, image_size, reach_px) -> str | None:
    if spot not in counts.index:
        return "no expression counts"
    if spot not in selection.index:
        return "no image position"
    if spot not in annotation.index:
        return "no cluster annotation"
    centre = selection.loc[spot, ["pixel_x", "pixel_y"]].to_numpy(np.float64)
    # One pixel of slack: patch corners are rounded to whole pixels.
    if (centre < reach_px + 1).any() or (centre > np.asarray(image_size) - reach_px - 1).any():
        return "image window leaves the section image"
    return None


def _thin(section: Section, max_spots: int | None) -> Section:
    if max_spots is None or max_spots >= len(section.spots):
        return section
    rows = np.linspace(0, len(section.spots) - 1, max_spots).astype(int)
    return dataclasses.replace(
        section,
        spots=tuple(section.spots[r] for r in rows),
        pixels=section.pixels[rows],
        clusters=section.clusters[rows],
        counts=section.counts.iloc[rows],
    )


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading section images needs Pillow; install it with: pip install 'histokd_jax[wsi]'") from error
    return Image


def _image_size(path: pathlib.Path) -> tuple[int, int]:
    with _open_large(path) as image:
        return image.size


def _open_large(path: pathlib.Path):
    """Opens a section image (about 92 megapixels), above Pillow's default guard against decompression bombs."""
    pillow = _pillow()
    limit, pillow.MAX_IMAGE_PIXELS = pillow.MAX_IMAGE_PIXELS, None
    try:
        return pillow.open(path)
    finally:
        pillow.MAX_IMAGE_PIXELS = limit


def _write_section(writer, source, section, patch_px, grid, stride_px, describe, standardise) -> None:
    with _open_large(source / section.name / IMAGES[section.name]) as opened:
        image = np.asarray(opened.convert("RGB"))
    origins = [patch_origins(centre, patch_px, grid, stride_px) for centre in section.pixels]
    bags = [describe(cut_patches(image, corners, patch_px)) for corners in origins]
    if standardise == "per_section":
        bags = standardise_bags(bags)
    for slide_id, spot, bag, corners in zip(section.slide_ids, section.spots, bags, origins):
        source_name = f"{IMAGES[section.name]} spot {spot}"
        writer.add(slide_id, CASE_ID, bag.astype(np.float16), corners, source=source_name)


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


def _write_tables(directory: pathlib.Path, sections: Sequence[Section], genes: GeneTable) -> None:
    tables = directory / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    rows = [
        (slide_id, int(cluster), section.name)
        for section in sections
        for slide_id, cluster in zip(section.slide_ids, section.clusters)
    ]
    columns = [[str(v) for v in column] for column in zip(*rows)]
    _write_padded(tables / "labels.csv", ("case_id", "cluster", "section"), columns)
    clusters = sorted({cluster for _, cluster, _ in rows})
    _write_json(tables / "label_names.json", {"cluster": {str(c): f"expression cluster {c}" for c in clusters}})
    write_gene_table(tables / "genes.npz", genes)


def _write_padded(path: pathlib.Path, header: Sequence[str], columns: Sequence[Sequence[str]]) -> None:
    """Writes columns of unequal length as CSV, padded with empty cells."""
    depth = max(len(column) for column in columns)
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(header)
        out.writerows([column[i] if i < len(column) else "" for column in columns] for i in range(depth))


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


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
