"""Writes maps of evidence: PNG overlays to look at, and the float arrays behind them."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.labelled.parts import Parts
from data_pipelines.labelled.patches import LabelledPatches
from data_pipelines.pairs import pixels
from histokd_jax.probe import files
from histokd_jax.probe.features import square
from histokd_jax.probe.maps import check_maps, class_maps, shown_area
from histokd_jax.probe.overlay import overlaid, stretched
from histokd_jax.probe.settings import LINEAR, Settings
from histokd_jax.probe.sources import Source
from histokd_jax.probe.training import Classifier

PREDICTED, TRUE = "predicted", "true"
_GAP = 4


@dataclasses.dataclass(frozen=True)
class MapOptions:
    """Which maps are written.

    Attributes:
      directory: one folder per encoder is made in it.
      count: images, of all folds in turn, tested ones only.
      of: the class whose evidence is shown, "predicted" or "true".
    """

    directory: pathlib.Path
    count: int = 16
    of: str = PREDICTED

    def __post_init__(self):
        if self.count < 1 or self.of not in (PREDICTED, TRUE):
            raise ValueError(
                f"--map-count {self.count}, --map-class {self.of}: expected at least 1, and predicted or true"
            )


def check_map_options(sources: Sequence[Source], settings: Settings, options: MapOptions) -> None:
    """Refuses maps that cannot be made.

    Raises:
      ValueError: no linear probe, no encoder, or a transformer of one block.
    """
    if LINEAR not in settings.probes:
        raise ValueError("--maps shows what the linear probe sees: add linear to --probes")
    encoders = [source for source in sources if source.loaded is not None]
    if not encoders:
        raise ValueError("--maps needs an encoder and its images: feature arrays have no positions")
    for source in encoders:
        check_maps(source.loaded.encoder)


def write_maps(
    source: Source, patches: LabelledPatches, parts: Parts, linear: Mapping[int, Classifier], options: MapOptions
) -> list[pathlib.Path]:
    """Maps of tested images by the probe of their fold, which has not seen them.

    Args:
      source: the encoder; feature arrays are passed over.
      patches: the data.
      parts: its split.
      linear: fold -> probe.
      options: see `MapOptions`.

    Returns:
      The files: DIR/LABEL/NUMBER_ID.png (image beside its overlay), and DIR/LABEL/maps.npz with ids, label, shown
      class, logits [n, C], and maps [n, h, w] on the grid of the encoder, not rescaled.
    """
    if source.loaded is None:
        return []
    written, kept = [], []
    for number, (fold, row) in enumerate(chosen_rows(patches, parts, options.count)):
        image, probe = square(patches.read(row)), linear[fold]
        logits = class_maps(source.loaded, image[None], probe.weights, probe.bias, patches.label[[row]])[1][0]
        shown = int(patches.label[row]) if options.of == TRUE else int(logits.argmax())
        grid = class_maps(source.loaded, image[None], probe.weights, probe.bias, np.array([shown]))[0][0]
        kept.append((row, fold, shown, logits, grid))
        written.append(_write_overlay(source, patches, options, number, row, image, grid))
    rows, folds, shown, logits, grids = (np.array(part) for part in zip(*kept))
    names = {"ids": np.array(patches.ids)[rows], "label": patches.label[rows], "fold": folds, "shown_class": shown}
    names |= {"class_names": np.array(patches.class_names), "encoder_sha256": np.array(source.loaded.sha256)}
    path = options.directory / source.label / "maps.npz"
    return [*written, files.write_npz(path, **names, logits=logits, maps=grids)]


def chosen_rows(patches: LabelledPatches, parts: Parts, count: int) -> list[tuple[int, int]]:
    """(fold, tested row), classes and folds in turn, the first patches of each."""
    queues = [
        [(k, int(row)) for row in fold.test if patches.label[row] == c]
        for k, fold in enumerate(parts.folds)
        for c in range(len(patches.class_names))
    ]
    longest = max(map(len, queues))
    in_turn = [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
    return in_turn[:count]


def _write_overlay(
    source: Source, patches: LabelledPatches, options: MapOptions, number: int, row: int, image: np.ndarray,
    grid: np.ndarray,
) -> pathlib.Path:  # fmt: skip
    edge = len(image)
    heat = stretched(grid, edge, *shown_area(source.loaded.encoder, edge))
    gap = np.full((edge, _GAP, 3), 255, np.uint8)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", patches.ids[row])
    content = pixels.to_png(np.concatenate([image, gap, overlaid(image, heat)], axis=1))
    return files.write_bytes(options.directory / source.label / f"{number:03d}_{name}.png", content)
