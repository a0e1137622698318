"""Slides that the tests paint and write themselves: tiled pyramidal TIFFs, lossless, as OpenSlide reads them."""

import numpy as np
import tifffile
from scipy import ndimage

GLASS = (243, 241, 244)


def glass(height, width, colour=GLASS, seed=0):
    """Empty glass with a little sensor noise."""
    noise = np.random.default_rng(seed).integers(-2, 3, (height, width, 3))
    return (np.asarray(colour)[None, None] + noise).clip(0, 255).astype(np.uint8)


def stain(rgb, mask, seed=0, blur=0.0):
    """Paints H&E-like tissue with nuclei where the mask is; `blur` in pixels defocuses it."""
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.normal(size=mask.shape).astype(np.float32), 3)
    nuclei = field > 1.2 * field.std()
    texture = ndimage.gaussian_filter(rng.normal(size=mask.shape).astype(np.float32), 1)
    tissue = np.where(nuclei[..., None], [105.0, 60, 140], [222.0, 160, 195]) + 60 * texture[..., None]
    if blur:
        tissue = ndimage.gaussian_filter(tissue, (blur, blur, 0))
    rgb[mask] = tissue.clip(20, 250).astype(np.uint8)[mask]
    return rgb


def ellipse(height, width, centre, radii):
    y, x = np.ogrid[:height, :width]
    return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1


def box(height, width, left, top, right, bottom):
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def halved(rgb):
    """Means of 2 x 2 pixels; an odd last row or column is dropped."""
    height, width = rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2
    parts = rgb[:height, :width].reshape(height // 2, 2, width // 2, 2, 3).astype(np.float64)
    return np.rint(parts.mean(axis=(1, 3))).astype(np.uint8)


def write(path, rgb, mpp=0.5, levels=3, mpp_y=None):
    """A pyramid of halves; `mpp` None records no resolution."""
    path.parent.mkdir(parents=True, exist_ok=True)
    density = {}
    if mpp is not None:
        density = {"resolution": (1e4 / mpp, 1e4 / (mpp_y or mpp)), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as out:
        for level in range(levels):
            options = {"tile": (128, 128), "photometric": "rgb", "compression": "zlib", "metadata": None, **density}
            out.write(rgb, subfiletype=1 if level else 0, **options)
            rgb, density = halved(rgb), {}
    return path


def with_tissue(path, seed=0, height=1400, width=1800, **options):
    """A slide with one piece of tissue in its middle: 0.7 x 0.9 mm at 0.5 um."""
    mask = ellipse(height, width, (width / 2, height / 2), (width / 3, height / 3))
    return write(path, stain(glass(height, width, seed=seed), mask, seed), **options)
