"""Names and dtypes that the writer, the readers, the pipeline and the models share. A leaf module: NumPy only."""

import numpy as np

FORMAT_VERSION = 1
FEATURE_DTYPES = {"float16": np.float16, "float32": np.float32}

# 256 KiB payload: larger records cross malloc's mmap threshold and read several times slower.
CHUNK_BYTES = 256 * 1024


def chunk_patches(feat_dim: int, dtype: str = "float16") -> int:
    """Patches per chunk record so that the payload is about 256 KiB (at least 1).

    Args:
      feat_dim: embedding width D.
      dtype: name of the stored dtype.

    Returns:
      Number of patches, e.g. 128 for D = 1024 in float16.
    """
    return max(1, CHUNK_BYTES // (feat_dim * np.dtype(FEATURE_DTYPES[dtype]).itemsize))


# Fields of a packed step; shapes are given in histokd_jax.types.Batch.
PATCHES, SEGMENT_IDS, POSITIONS, COORDS = "patches", "segment_ids", "positions", "coords"
CLUSTERS, NEIGHBOURS = "clusters", "neighbours"
WEIGHT, SLIDE_INDEX, LABEL, GENES, HAS_GENES = "weight", "slide_index", "label", "genes", "has_genes"
TIME, EVENT = "time_months", "event"
TEACHER_HAZARDS, HAS_TEACHER = "teacher_hazards", "has_teacher"
ROW_FIELDS = (PATCHES, SEGMENT_IDS, POSITIONS, COORDS, CLUSTERS, NEIGHBOURS)
"""Fields with leading axes [R, L]; sharded over rows. All other fields are per slot [S, ...] and replicated."""

# Fields of a step of image pairs; shapes are given in histokd_jax.types.Batch.
IMAGE, PARTNER, HAS_PARTNER, HAS_LABEL, EXAMPLE = "image", "partner", "has_partner", "has_label", "example"
PAIR_FIELDS = (IMAGE, PARTNER, HAS_PARTNER, LABEL, HAS_LABEL, EXAMPLE, WEIGHT, SLIDE_INDEX)
"""Fields with a leading axis [B], one example each; sharded over examples."""
