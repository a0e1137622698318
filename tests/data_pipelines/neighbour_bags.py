"""Bags held in memory, with coordinates."""

import numpy as np

from data_pipelines.manifest import Manifest, Slide


class MemoryReader:
    """Features [n, 3]: number of the slide, then its coordinates; reading wraps modulo the bag size."""

    def __init__(self, sizes, seed=0):
        rng = np.random.default_rng(seed)
        cells = [rng.permutation(64)[:n] for n in sizes]
        self.coords = [np.stack([c % 8, c // 8], axis=1).astype(np.int32) * 256 for c in cells]
        slides = tuple(Slide(f"S-{i}", f"C-{i}", 0, i, 1, n) for i, n in enumerate(sizes))
        facts = dict(name="x", feat_dim=3, dtype="float32", chunk_patches=4, seed=0, encoder=None, mpp=None)
        facts |= dict(magnification=None, patch_size_level0=None, simulated=True, simulation=None, notes="", shards=())
        self.manifest = Manifest(directory=None, slides=slides, slides_sha256=str(sizes), **facts)

    def read_into(self, slide, start, count, out, coords_out=None):
        rows = (start + np.arange(count)) % len(self.coords[slide])
        out[:, 0], out[:, 1:] = slide, self.coords[slide][rows]
        if coords_out is not None:
            coords_out[:] = self.coords[slide][rows]

    def slide_numbers(self, slide, positions):
        return None
