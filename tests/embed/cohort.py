"""A tiny cohort: painted slides with coordinate files, and a tiny encoder."""

import encoder_reference as reference
import numpy as np
import wsi_slides

from data_pipelines.importers.cases import CaseRule
from data_pipelines.wsi.coords import TileGrid, write_coords
from histokd_jax.embed import plan, run, slides
from histokd_jax.embed.embedder import Compute, Embedder
from histokd_jax.encoders import loading
from histokd_jax.encoders.presets import Transform

PX, LEVEL0 = 32, 64
SPEC = reference.TINY["uni2_h"]
COMPUTE = {"dtype": "float32", "batch": 8}


def tiny_encoder(seed=0, **changes):
    """28 px inputs, tiles of another size are resized to 32 and cropped."""
    changes = {"transform": Transform(size=28, resize=30)} | changes
    return loading.random(reference.encoder(SPEC, **changes), seed)


def trained(loaded):
    """The same encoder as if its weights came from a file."""
    import dataclasses

    return dataclasses.replace(loaded, weights="weights.pt")


def paint(folder, name, seed=0, height=400, width=500, **options):
    return wsi_slides.with_tissue(folder / f"{name}.tiff", seed, height=height, width=width, **options)


def grid_of(name, n, dimensions=(500, 400), **changes):
    """n tiles of 32 px at 1 um from slides with 0.5 um."""
    coords = np.array([[(i % 6) * LEVEL0 + 57, (i // 6) * LEVEL0 + 41] for i in range(n)], np.int32)
    facts = {"mpp": 1.0, "magnification": 10.0, "level0_mpp": 0.5, "slide_file": f"{name}.tiff"}
    facts |= {"level0_width": dimensions[0], "level0_height": dimensions[1]}
    return TileGrid(name, coords.reshape(-1, 2), PX, LEVEL0, **{**facts, **changes})


def coords_path(folder, name):
    return folder / "job" / "10x_32px_0px_overlap" / "patches" / f"{name}_patches.h5"


COUNTS = {"TCGA-AA-0001-01Z-00-DX1": 11, "TCGA-AA-0002-01Z-00-DX1.x-y": 30, "TCGA-BB-0003-01Z-00-DX1": 8}
COUNTS |= {"TCGA-BB-0004-01Z-00-DX1": 3, "TCGA-BB-0005-01Z-00-DX1": 17}


def write_cohort(folder, counts=None):
    """folder/slides/*.tiff and folder/job/."""
    for seed, (name, n) in enumerate((COUNTS if counts is None else counts).items()):
        paint(folder / "slides", name, seed)
        write_coords(coords_path(folder, name), grid_of(name, n))
    return folder


def make_plan(folder, loaded=None, compute=COMPUTE, images=False, rule=None, **options):
    options = {"name": "toy", "shard_bytes": 1500} | options
    root = folder / "slides"
    found, rejected = (slides.find_images(root), []) if images else slides.find_slides(root, folder / "job")
    return plan.make_plan(
        root, found, rejected, loaded or tiny_encoder(), options=plan.Options(**options),
        rule=rule or CaseRule(), compute=compute,
    )  # fmt: skip


def embedder(loaded=None, **changes):
    return Embedder(loaded or tiny_encoder(), Compute(**{"batch": 8, "devices": 2} | changes))


def embed(folder, out, loaded=None, **options):
    loaded = loaded or tiny_encoder()
    return run.run_embedding(make_plan(folder, loaded, **options), out, embedder(loaded), threads=2)
