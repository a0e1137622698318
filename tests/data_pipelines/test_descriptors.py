"""The hand-made H&E descriptor against independent float64 references and patches whose answer is known."""

import sys

import numpy as np
import pytest
from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

from data_pipelines import descriptors
from data_pipelines.descriptors import describe_patches, descriptor_names, optical_density, raw_descriptors


@pytest.fixture(scope="module")
def patches():
    """Smooth random patches with nuclei-like dark discs."""
    rng = np.random.default_rng(0)
    image = rng.integers(150, 256, (4, 32, 32, 3)).astype(np.uint8)
    y, x = np.indices((32, 32))
    for i in range(4):
        image[i][(y - 10) ** 2 + (x - 8 - 4 * i) ** 2 < 20] = (60, 40, 110)
    return image


def _raw(patches, name):
    return raw_descriptors(patches)[:, descriptor_names().index(name)]


def test_width_names_dtype_and_range(patches):
    out = describe_patches(patches)
    names = descriptor_names()
    assert out.shape == (4, len(names)) == (4, 122) and out.dtype == np.float32
    assert len(set(names)) == len(names)
    assert np.isfinite(out.astype(np.float16)).all()


def test_each_patch_is_described_on_its_own(patches):
    together = describe_patches(patches)
    alone = np.concatenate([describe_patches(patch[None]) for patch in patches[::-1]])[::-1]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_scaling_is_the_documented_affine_map(patches):
    scaled, raw = describe_patches(patches), raw_descriptors(patches)
    column = descriptor_names().index("stain.haematoxylin.mean")
    np.testing.assert_allclose(scaled[:, column], (raw[:, column] - 0.5) / 0.2, rtol=1e-5)


def test_optical_density_is_beer_lambert():
    rgb = np.array([[0, 127, 255]], np.uint8)
    np.testing.assert_allclose(optical_density(rgb), -np.log10((rgb + 1.0) / 256.0), atol=1e-6)


def test_unmixing_recovers_known_amounts_of_stain():
    haematoxylin, eosin = np.array([0.65, 0.70, 0.29]), np.array([0.07, 0.99, 0.11])
    haematoxylin, eosin = haematoxylin / np.linalg.norm(haematoxylin), eosin / np.linalg.norm(eosin)
    density = (0.8 * haematoxylin + 0.3 * eosin).astype(np.float32)
    np.testing.assert_allclose(descriptors.unmix_stains(density), [0.8, 0.3, 0.0], atol=1e-5)


def test_stain_moments_match_a_float64_reference(patches):
    vectors = np.array([(0.65, 0.70, 0.29), (0.07, 0.99, 0.11)])
    vectors = np.vstack([vectors, np.cross(*vectors)])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    density = -np.log10((patches[1].reshape(-1, 3) + 1.0) / 256.0)
    amounts = np.linalg.solve(vectors.T, density.T).T
    for column, stain in enumerate(("haematoxylin", "eosin", "residual")):
        value = amounts[:, column]
        skew = np.mean((value - value.mean()) ** 3) / value.std() ** 3
        expected = {"mean": value.mean(), "std": value.std(), "skew": np.arcsinh(skew), "p90": np.quantile(value, 0.9)}
        for moment, number in expected.items():
            np.testing.assert_allclose(_raw(patches, f"stain.{stain}.{moment}")[1], number, rtol=2e-3, atol=1e-4)


def test_glass_fraction_counts_unstained_pixels(patches):
    patch = np.full((1, 32, 32, 3), 250, np.uint8)
    patch[:, :, :8] = (90, 60, 130)
    assert _raw(patch, "stain.glass_fraction")[0] == pytest.approx(0.75)


def test_separate_nuclei_are_counted_and_touching_ones_are_not():
    patch = np.full((1, 64, 64, 3), 245, np.uint8)
    y, x = np.indices((64, 64))
    for cy, cx in ((14, 14), (14, 46), (46, 30)):
        patch[0][(y - cy) ** 2 + (x - cx) ** 2 <= 36] = (50, 30, 110)
    assert _raw(patch, "nuclei.blobs_per_1000px")[0] == pytest.approx(3 * 1000 / 64**2)
    width = _raw(patch, "nuclei.mean_blob_width_px")[0]
    assert width == pytest.approx(np.sqrt(np.pi * 36), rel=0.15)
    patch[0][10:18, 14:46] = (50, 30, 110)
    assert _raw(patch, "nuclei.blobs_per_1000px")[0] == pytest.approx(2 * 1000 / 64**2)


def test_lbp_and_glcm_match_scikit_image_patch_by_patch(patches):
    density = -np.log10((patches[2].astype(np.float64) + 1.0) / 256.0)
    grey = (np.clip(density[..., 1] / 1.5, 0, 1).astype(np.float32) * 255.0).astype(np.uint8)
    codes = local_binary_pattern(grey, 16, 3, method="uniform")[3:-3, 3:-3]
    histogram = np.sqrt([np.mean(codes == k) for k in range(18)])
    measured = [_raw(patches, f"lbp.green.p16r3.{k}")[2] for k in range(18)]
    np.testing.assert_allclose(measured, histogram, atol=0.03)
    angles = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
    matrix = graycomatrix(grey // 16, (1, 3, 7), angles, levels=16, symmetric=True, normed=True)
    mean = matrix.mean(-1, keepdims=True)
    for prop in ("contrast", "dissimilarity", "homogeneity", "energy", "correlation"):
        expected = graycoprops(mean, prop)[:, 0]
        measured = [_raw(patches, f"glcm.green.d{d}.{prop}")[2] for d in (1, 3, 7)]
        np.testing.assert_allclose(measured, expected, rtol=0.02, atol=0.01)


def test_constant_patch_is_finite_and_has_no_texture():
    patch = np.full((2, 16, 16, 3), 200, np.uint8)
    raw = raw_descriptors(patch)
    assert np.isfinite(raw).all()
    assert _raw(patch, "glcm.green.d1.contrast")[0] == 0.0
    assert _raw(patch, "glcm.green.d1.correlation")[0] == 1.0
    assert _raw(patch, "stain.haematoxylin.std")[0] == pytest.approx(0.0, abs=1e-5)


def test_texture_is_invariant_to_quarter_turns(patches):
    names = descriptor_names()
    glcm = [i for i, name in enumerate(names) if name.startswith(("glcm.", "stain.", "nuclei."))]
    turned = np.ascontiguousarray(np.rot90(patches, axes=(1, 2)))
    np.testing.assert_allclose(
        raw_descriptors(turned)[:, glcm], raw_descriptors(patches)[:, glcm], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 32, 32, 3), np.float32), np.zeros((32, 32, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)]
)
def test_wrong_patches_are_refused(bad):
    with pytest.raises(ValueError, match="uint8"):
        describe_patches(bad)


def test_missing_scikit_image_names_the_extra(monkeypatch, patches):
    monkeypatch.setitem(sys.modules, "skimage.feature", None)
    descriptors._skimage.cache_clear()
    with pytest.raises(ImportError, match=r"histokd_jax\[wsi\]"):
        describe_patches(patches)
    descriptors._skimage.cache_clear()
