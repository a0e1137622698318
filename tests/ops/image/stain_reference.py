"""Float64 stain normalisation, written from the papers with other means than the library (SVD, sorting, NNLS)."""

import numpy as np
from scipy.optimize import nnls
from skimage import color


def density(pixels, background):
    return -np.log(np.maximum(np.asarray(pixels, np.float64), 1) / background)


def macenko_fit(pixels, background=240.0, least=0.15, percentile=1.0):
    """(stains [2, 3], maximum [2])."""
    od = density(pixels, background).reshape(-1, 3)
    od = od[(od >= least).all(1)]
    main, second = np.linalg.svd(od - od.mean(0), full_matrices=False)[2][:2]
    main = main * np.sign(main.sum())
    angle = np.arctan2(od @ second, od @ main)
    stains = np.array(
        [np.cos(a) * main + np.sin(a) * second for a in np.percentile(angle, [percentile, 100 - percentile])]
    )
    stains = stains[np.argsort(-stains[:, 0])]
    amounts = np.linalg.lstsq(stains.T, od.T, rcond=None)[0]
    return stains, np.percentile(amounts, 99, axis=1)


def macenko_transform(image, source, target, background=240.0):
    """Float image; source and target are (stains, maximum, ...)."""
    od = density(image, background).reshape(-1, 3)
    amounts = np.linalg.lstsq(source[0].T, od.T, rcond=None)[0] * (target[1] / source[1])[:, None]
    return (background * np.exp(-(target[0].T @ amounts))).T.reshape(image.shape)


def reinhard_fit(pixels, lightness=80.0):
    lab = color.rgb2lab(np.asarray(pixels, np.uint8).reshape(1, -1, 3))[0]
    lab = lab[lab[:, 0] < lightness]
    return lab.mean(0), lab.std(0)


def reinhard_transform(image, source, target):
    before = color.rgb2lab(image)
    after = (before - source[0]) * (target[1] / source[1]) + target[0]
    share = np.clip((100 - before[..., :1]) / 20, 0, 1)
    lab = share * after + (1 - share) * before
    xyz = color.lab2xyz(lab)
    linear = np.clip(xyz @ np.linalg.inv(color.colorconv.xyz_from_rgb).T, 0, 1)
    return 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def sparse_amounts(od, stains, sparsity):
    """Non-negative lasso by completing the square and NNLS, pixel by pixel."""
    factor = np.linalg.cholesky(stains @ stains.T)
    wanted = np.linalg.solve(factor, stains @ od.T - sparsity).T
    return np.array([nnls(factor.T, row)[0] for row in wanted])


def objective(od, stains, sparsity):
    amounts = sparse_amounts(od, stains, sparsity)
    return 0.5 * ((od - amounts @ stains) ** 2).sum() + sparsity * amounts.sum()


def white_level(pixels):
    return np.clip(np.percentile(np.asarray(pixels).reshape(-1, 3).max(1), 99), 128, 255)


def vahadane_transform(image, source, target, sparsity=0.01):
    """Source and target are (stains, maximum, background)."""
    od = density(image, source[2]).reshape(-1, 3)
    amounts = sparse_amounts(od, source[0], sparsity) * (target[1] / source[1])
    return (target[2] * np.exp(-(amounts @ target[0]))).reshape(image.shape)


def angle(first, second):
    """Degrees between rows."""
    cosine = (first * second).sum(-1) / np.linalg.norm(first, axis=-1) / np.linalg.norm(second, axis=-1)
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))
