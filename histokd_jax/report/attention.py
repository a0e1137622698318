"""Pictures of attention on single images: the image, its partner, and one map per network beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from data_pipelines.atomic import storage_errors
from histokd_jax.report import plots
from histokd_jax.report.results import mode_title


def write_picture(
    path: pathlib.Path, image: np.ndarray, partner: np.ndarray | None, maps: Mapping[str, np.ndarray]
) -> None:
    """Writes one PNG.

    Args:
      path: the file.
      image: [H, W, 3] uint8.
      partner: [H, W, 3] uint8, or None.
      maps: mode -> [h, w] attention over the grid of tokens, laid over the image; each map has its own scale.

    Raises:
      ImportError: without Matplotlib; names the extra `report`.
      StorageError: the file cannot be written.
    """
    panels = [("H&E", image, None), *([("partner", partner, None)] if partner is not None else [])]
    panels += [(mode_title(mode), image, grid) for mode, grid in maps.items()]
    with plots.canvas(len(panels), height=3.4, wide=len(panels) > 2) as (figure, axes):
        for axis, (title, shown, grid) in zip(axes, panels, strict=True):
            axis.imshow(shown)
            if grid is not None:
                extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
                axis.imshow(grid, cmap="inferno", alpha=0.55, extent=extent, interpolation="nearest")
            axis.set(title=title)
            axis.set_axis_off()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
