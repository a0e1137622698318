"""Float64 references of image arithmetic, written from the formulas, and small test images."""

import colorsys

import numpy as np
from scipy import ndimage


def picture(height, width, seed=0, dtype=np.uint8):
    """Smooth colours plus noise, levels 0..255, some of them exactly 0 and 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + c) * np.cos(y / 7 - c) for c in range(3)]
    values = 128 + 110 * np.stack(waves, -1) + rng.normal(0, 25, (height, width, 3))
    return np.clip(np.round(values), 0, 255).astype(dtype)


STAINS = np.array([[0.60, 0.72, 0.35], [0.12, 0.95, 0.28]])


def tissue(height, width, seed=0, white=0.2, noise=0.02, stains=STAINS, strength=(1.0, 1.0), pure=0.0):
    """A simulated H&E tile (uint8): two stains with varying amounts, glass on top, some pixels with one stain only."""
    rng = np.random.default_rng(seed)
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    amounts = rng.gamma(2.0, 0.35, (height, width, 2)) + 0.05
    kind = rng.random((height, width))
    amounts[..., 0] *= kind < 0.6
    amounts[..., 1] *= kind >= pure
    amounts[: int(height * white)] = 0
    density = (amounts * strength) @ stains + rng.normal(0, noise, (height, width, 3))
    return np.clip(np.round(245 * np.exp(-density)), 0, 255).astype(np.uint8)


def source_coordinates(height, width, angle):
    """[2, H, W] float64 (y, x): where each pixel of an image turned counter-clockwise comes from."""
    middle = np.array([(height - 1) / 2, (width - 1) / 2])
    y, x = np.mgrid[:height, :width].astype(np.float64) - middle[:, None, None]
    # Rows point down: a counter-clockwise turn of the content takes a pixel from the clockwise side.
    return (
        np.stack([np.sin(angle) * x + np.cos(angle) * y, np.cos(angle) * x - np.sin(angle) * y]) + middle[:, None, None]
    )


def rotate_bilinear(image, angle, fill=0.0):
    """SciPy's linear interpolation with a constant border that takes part in it."""
    at = source_coordinates(*image.shape[:2], angle)
    planes = [
        ndimage.map_coordinates(image[..., c].astype(np.float64), at, order=1, mode="grid-constant", cval=fill)
        for c in range(image.shape[-1])
    ]
    return np.stack(planes, -1)


def rotate_nearest(image, angle, fill=0.0):
    """(turned image, [H, W] bool where a coordinate is too close to a tie for single precision)."""
    at = source_coordinates(*image.shape[:2], angle)
    index = np.floor(at + 0.5).astype(int)
    near = (np.abs(at + 0.5 - np.round(at + 0.5)) < 1e-3).any(0)
    height, width = image.shape[:2]
    inside = (index >= 0).all(0) & (index[0] < height) & (index[1] < width)
    out = np.full(image.shape, fill, image.dtype)
    out[inside] = image[index[0][inside], index[1][inside]]
    return out, near


def resize(window, size):
    """Bilinear, half-pixel centres, edges repeated, no antialias: pixel by pixel."""
    out = np.zeros((*size, window.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * window.shape[0] / size[0] - 0.5, 0), window.shape[0] - 1)
            x = min(max((j + 0.5) * window.shape[1] / size[1] - 0.5, 0), window.shape[1] - 1)
            y0, x0 = int(np.floor(y)), int(np.floor(x))
            y1, x1 = min(y0 + 1, window.shape[0] - 1), min(x0 + 1, window.shape[1] - 1)
            upper = window[y0, x0] * (1.0 - (x - x0)) + window[y0, x1] * (x - x0)
            lower = window[y1, x0] * (1.0 - (x - x0)) + window[y1, x1] * (x - x0)
            out[i, j] = upper * (1 - (y - y0)) + lower * (y - y0)
    return out


def in_hsv(image, change):
    """Applies change(h, s, v) -> (h, s, v), pixel by pixel with the standard library; the scale of v is 0..255."""
    flat = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel))) for pixel in image.reshape(-1, 3).astype(float)]
    return np.array(flat).reshape(image.shape)
