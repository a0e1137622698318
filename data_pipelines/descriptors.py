"""A documented hand-made descriptor of H&E patches, for real images while no trained encoder is at hand.

`stain_lbp_glcm` describes one RGB patch by 122 numbers in five groups:

  stain   moments (skewness as its arcsinh) and quantiles of haematoxylin, eosin and residual optical density after
          colour deconvolution (Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 2001), and the fraction of bare glass;
  colour  mean and standard deviation of R, G, B;
  nuclei  nuclei-like density: area fraction, blob count, blob size and peak count of smoothed haematoxylin;
  lbp     square roots of histograms of rotation-invariant uniform local binary patterns (Ojala et al., TPAMI 2002);
  glcm    co-occurrence statistics (Haralick et al., 1973) averaged over four directions.

LBP and GLCM are taken of haematoxylin and of green optical density. Green is where eosin absorbs most; unmixed eosin
itself is close to zero on strongly haematoxylin-stained slides, so that its texture would be rounding noise.

Every number is shifted and divided by a fixed constant written in this file, so that typical values are of order one
and fit float16. Nothing is fitted to data: the descriptor of a patch depends on that patch alone.
"""

from __future__ import annotations

import functools
import itertools
from types import ModuleType

import numpy as np
from scipy import ndimage

STAINS = ("haematoxylin", "eosin", "residual")
TEXTURES = ("haematoxylin", "green")
# Absorption of pure stains in (R, G, B), Ruifrok & Johnston 2001; the residual axis is orthogonal to both.
_HAEMATOXYLIN, _EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
_MOMENTS = ("mean", "std", "skew", "p10", "p50", "p90")
_LBP = ((8, 1), (16, 3))
_GLCM_DISTANCES = (1, 3, 7)
_GLCM_LEVELS = 16
_GLASS_DENSITY = 0.35  # total optical density below which a pixel counts as bare glass
_NUCLEUS_DENSITY = 0.6  # haematoxylin density, smoothed, above which a pixel counts as nuclear
_FULL_SCALE = 1.5  # optical density mapped to the highest grey level for LBP and GLCM
_MIN_PATCH = 16


def descriptor_names() -> tuple[str, ...]:
    """Name of every entry of `stain_lbp_glcm`, in order; the descriptor's width is their number.

    Returns:
      Tuple of unique names such as "stain.haematoxylin.mean" or "glcm.eosin.d3.contrast".
    """
    return tuple(name for name, _, _ in _layout())


def describe_patches(patches: np.ndarray) -> np.ndarray:
    """The `stain_lbp_glcm` descriptor of each patch, scaled by the fixed constants of this module.

    Args:
      patches: [n, P, P, 3] uint8, RGB, P >= 16.

    Returns:
      [n, D] float32 with D = len(descriptor_names()), finite and of order one.

    Raises:
      ValueError: if the array is not uint8 RGB of at least 16 x 16 pixels.
      ImportError: if scikit-image is missing (extra `wsi`).
    """
    _check_patches(patches)
    raw = raw_descriptors(patches)
    offset = np.array([o for _, o, _ in _layout()], np.float32)
    scale = np.array([s for _, _, s in _layout()], np.float32)
    return (raw - offset) / scale


def raw_descriptors(patches: np.ndarray) -> np.ndarray:
    """The descriptor before scaling, in the units its names state (optical density, fractions, pixels).

    Args:
      patches: [n, P, P, 3] uint8, RGB.

    Returns:
      [n, D] float32.
    """
    density = optical_density(patches)
    stains = unmix_stains(density)
    groups = [_stain_moments(stains), _glass_fraction(density), _colour_moments(patches), _nuclei(stains[..., 0])]
    grey = _grey_levels(np.stack([stains[..., 0], density[..., 1]], axis=-1))
    groups += [_lbp_histograms(grey[..., s]) for s in range(2)]
    groups += [_glcm_statistics(grey[..., s]) for s in range(2)]
    return np.concatenate(groups, axis=1).astype(np.float32)


def optical_density(rgb: np.ndarray) -> np.ndarray:
    """Decadic optical density -log10((I + 1) / 256) of each channel (Beer-Lambert law).

    Args:
      rgb: [..., 3] uint8.

    Returns:
      [..., 3] float32 in 0 (glass) .. 2.41 (black).
    """
    table = -np.log10((np.arange(256, dtype=np.float64) + 1.0) / 256.0)
    return table.astype(np.float32)[rgb]


def unmix_stains(density: np.ndarray) -> np.ndarray:
    """Amount of haematoxylin, eosin and residual per pixel by colour deconvolution (Ruifrok & Johnston 2001).

    Args:
      density: [..., 3] float32 optical density of R, G, B.

    Returns:
      [..., 3] float32 amounts in optical density along unit stain vectors; may be negative.
    """
    return density @ _unmixing_matrix()


@functools.cache
def _unmixing_matrix() -> np.ndarray:
    stains = np.array([_HAEMATOXYLIN, _EOSIN, np.cross(_HAEMATOXYLIN, _EOSIN)], np.float64)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    return np.linalg.inv(stains).astype(np.float32)


@functools.cache
def _layout() -> tuple[tuple[str, float, float], ...]:
    """(name, offset, scale) of every entry; the constants are round numbers of the size seen on H&E slides."""
    levels = {"haematoxylin": 0.5, "eosin": 0.0, "residual": 0.05}
    widths = {"haematoxylin": 0.2, "eosin": 0.05, "residual": 0.02}
    rows = [(f"stain.{s}.{m}", *_moment_scale(m, levels[s], widths[s])) for s in STAINS for m in _MOMENTS]
    rows += [("stain.glass_fraction", 0.0, 0.3)]
    rows += [(f"colour.{c}.{m}", o, s) for c in "RGB" for m, o, s in (("mean", 0.6, 0.15), ("std", 0.15, 0.05))]
    nuclei = (("area_fraction", 0.3, 0.2), ("blobs_per_1000px", 1.0, 0.5), ("mean_blob_width_px", 15.0, 10.0))
    nuclei += (("sd_blob_width_px", 10.0, 7.0), ("peaks_per_1000px", 3.0, 1.5))
    rows += [(f"nuclei.{n}", o, s) for n, o, s in nuclei]
    for s in TEXTURES:
        rows += [(f"lbp.{s}.p{p}r{r}.{k}", 0.25, 0.1) for p, r in _LBP for k in range(p + 2)]
    # Squared and absolute grey-level differences grow with distance, the other statistics hardly do.
    glcm = (("contrast", 2.0, 2.0), ("dissimilarity", 1.0, 0.6), ("homogeneity", 0.6, 0.15))
    glcm += (("energy", 0.25, 0.15), ("entropy", 5.0, 1.0), ("correlation", 0.7, 0.2))
    for s, d in itertools.product(TEXTURES, _GLCM_DISTANCES):
        growth = {"contrast": d**0.5, "dissimilarity": d**0.5}
        rows += [(f"glcm.{s}.d{d}.{k}", o * growth.get(k, 1.0), c * growth.get(k, 1.0)) for k, o, c in glcm]
    return tuple(rows)


def _moment_scale(moment: str, level: float, width: float) -> tuple[float, float]:
    """(offset, scale) of one stain moment from the stain's usual level and spread in optical density."""
    if moment == "skew":
        return 0.0, 1.0
    return (width, width) if moment == "std" else (level, width)


def _check_patches(patches: np.ndarray) -> None:
    shape_ok = patches.ndim == 4 and patches.shape[-1] == 3 and patches.shape[1] == patches.shape[2] >= _MIN_PATCH
    if not shape_ok or patches.dtype != np.uint8:
        raise ValueError(
            f"patches have shape {patches.shape} and dtype {patches.dtype}; "
            f"expected uint8 [n, P, P, 3] in RGB with P >= {_MIN_PATCH}"
        )


def _stain_moments(stains: np.ndarray) -> np.ndarray:
    flat = stains.reshape(len(stains), -1, 3)
    mean, std = flat.mean(1), flat.std(1)
    # arcsinh: a patch of glass with one speck has a skewness of 20 and more.
    skew = np.arcsinh(((flat - mean[:, None]) ** 3).mean(1) / np.maximum(std, 0.02) ** 3)
    p10, p50, p90 = np.quantile(flat, (0.1, 0.5, 0.9), axis=1)
    return np.stack([mean, std, skew, p10, p50, p90], axis=2).reshape(len(stains), -1)


def _glass_fraction(density: np.ndarray) -> np.ndarray:
    return (density.sum(-1) < _GLASS_DENSITY).mean(axis=(1, 2))[:, None]


def _colour_moments(patches: np.ndarray) -> np.ndarray:
    flat = patches.reshape(len(patches), -1, 3).astype(np.float32) / 255.0
    return np.stack([flat.mean(1), flat.std(1)], axis=2).reshape(len(patches), -1)


def _nuclei(haematoxylin: np.ndarray) -> np.ndarray:
    """[n, P, P] density -> [n, 5] nuclei-like statistics; touching nuclei count as one blob but several peaks."""
    smooth = ndimage.gaussian_filter(haematoxylin, (0.0, 1.5, 1.5))
    mask = smooth > _NUCLEUS_DENSITY
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = True
    labels, _ = ndimage.label(mask, in_plane)
    peaks = mask & (smooth == ndimage.maximum_filter(smooth, (1, 7, 7)))
    per_1000 = 1000.0 / mask[0].size
    rows = np.empty((len(mask), 5))
    for i, (patch, blobs) in enumerate(zip(mask, labels)):
        area = np.bincount(blobs.ravel())[1:]
        width = np.sqrt(area[area >= 12])
        spread = (width.mean(), width.std()) if len(width) else (0.0, 0.0)
        rows[i] = (patch.mean(), len(width) * per_1000, *spread, peaks[i].sum() * per_1000)
    return rows


def _grey_levels(density: np.ndarray) -> np.ndarray:
    return (np.clip(density / _FULL_SCALE, 0.0, 1.0) * 255.0).astype(np.uint8)


def _lbp_histograms(grey: np.ndarray) -> np.ndarray:
    """[n, P, P] uint8 -> [n, 28] square roots of histograms (Hellinger map).

    Pixels whose circle leaves the patch are left out.
    """
    feature = _skimage("skimage.feature")
    rows = []
    for patch in grey:
        parts = []
        for points, radius in _LBP:
            codes = feature.local_binary_pattern(patch, points, radius, method="uniform")
            inner = codes[radius:-radius, radius:-radius].astype(np.int64)
            parts.append(np.sqrt(np.bincount(inner.ravel(), minlength=points + 2) / inner.size))
        rows.append(np.concatenate(parts))
    return np.stack(rows)


def _glcm_statistics(grey: np.ndarray) -> np.ndarray:
    """[n, P, P] uint8 -> [n, 18] statistics of the symmetric co-occurrence matrix averaged over four directions."""
    feature = _skimage("skimage.feature")
    angles = (0.0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
    quantised = grey // (256 // _GLCM_LEVELS)
    matrices = [
        feature.graycomatrix(q, _GLCM_DISTANCES, angles, levels=_GLCM_LEVELS, symmetric=True, normed=True).mean(-1)
        for q in quantised
    ]
    p = np.moveaxis(np.stack(matrices), -1, 1)
    i, j = np.indices((_GLCM_LEVELS, _GLCM_LEVELS))
    total = functools.partial(np.sum, axis=(-2, -1))
    mean = total(p * i)
    variance = total(p * (i - mean[..., None, None]) ** 2)
    covariance = total(p * (i - mean[..., None, None]) * (j - mean[..., None, None]))
    # A constant patch has no variance; its neighbours agree perfectly, hence correlation 1 (as in scikit-image).
    correlation = np.where(variance > 1e-12, covariance / np.maximum(variance, 1e-12), 1.0)
    statistics = (
        total(p * (i - j) ** 2),
        total(p * np.abs(i - j)),
        total(p / (1.0 + (i - j) ** 2)),
        np.sqrt(total(p**2)),
        -total(p * np.log2(np.maximum(p, 1e-12))),
        correlation,
    )
    return np.stack(statistics, axis=-1).reshape(len(grey), -1)


@functools.cache
def _skimage(module: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "the patch descriptor stain_lbp_glcm needs scikit-image; install it with: pip install 'histokd_jax[wsi]'"
        ) from error
