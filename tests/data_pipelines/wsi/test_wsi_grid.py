"""Sizes and positions of tiles, exact coverage, one verdict for every position; sharpness."""

import numpy as np
import pytest
import wsi_slides as slides
from scipy import ndimage

from data_pipelines.errors import DataError
from data_pipelines.wsi import focus
from data_pipelines.wsi.grid import TileOptions, candidates, coverage, positions, size_level0
from data_pipelines.wsi.tissue import TissueMap


@pytest.mark.parametrize(
    ("mpp", "downsamples", "wanted"),
    [
        (0.25, (1.0, 4.0), 512),
        (0.5, (1.0, 4.0), 256),
        (0.499, (1.0,), 256),  # within the tolerance of level 0: read without resampling
        (0.2525, (1.0, 2.0005), 512),
        (0.228175, (1.0, 2.0, 4.0), 561),  # no level near: 256 * 0.5 / 0.228175
        (0.1, (1.0,), 1280),
        (0.505, (1.0,), 256),
    ],
)
def test_edge_at_level_0(mpp, downsamples, wanted):
    assert size_level0(TileOptions(), mpp, downsamples) == wanted


def test_a_slide_coarser_than_the_tiles_is_refused():
    with pytest.raises(DataError, match=r"magnified; choose a larger --target-mpp"):
        size_level0(TileOptions(mpp=0.25), 0.5, (1.0, 2.0))
    assert size_level0(TileOptions(mpp=0.25, mpp_tolerance=0.1), 0.27, (1.0,)) == 256


@pytest.mark.parametrize("change", [{"mpp": 0}, {"overlap": 256}, {"patch_size": 4}, {"min_tissue": 0}])
def test_bad_options_are_refused(change):
    with pytest.raises(DataError, match=f"tile option {next(iter(change))} is"):
        TileOptions(**change)


def test_positions_cover_the_edge_and_are_multiples_of_the_step():
    assert positions(1000, 256, 256).tolist() == [0, 256, 512, 768]
    assert positions(1024, 256, 256).tolist() == [0, 256, 512, 768]
    assert positions(1000, 256, 192).tolist() == [0, 192, 384, 576, 768]
    assert positions(100, 256, 256).tolist() == [0]
    for edge in range(200, 900, 37):
        found = positions(edge, 200, 150)
        assert found[-1] + 200 >= edge and (len(found) == 1 or found[-2] + 200 < edge)


def test_coverage_equals_a_count_on_a_fine_grid():
    """Reference: the mask blown up so that tiles cut no pixel."""
    rng = np.random.default_rng(0)
    mask = rng.random((7, 9)) < 0.4
    fine = mask.repeat(12, 0).repeat(12, 1)  # a slide of 108 x 84 pixels
    corners = rng.integers(0, 60, (50, 2))
    wanted = [fine[y : y + 24, x : x + 24].mean() for x, y in corners]
    np.testing.assert_allclose(coverage(mask, corners, 24, (108, 84)), wanted, atol=1e-12)


def test_coverage_beyond_the_slide_is_none():
    mask = np.ones((4, 4), bool)
    found = coverage(mask, np.array([[0, 0], [32, 0], [32, 32]]), 16, (40, 40))
    np.testing.assert_allclose(found, [1, 0.5, 0.25])


def masks(tissue=None, ink=None, black=None, shape=(40, 40)):
    nothing = np.zeros(shape, bool)
    found = [nothing if mask is None else mask for mask in (tissue, ink, black)]
    return TissueMap(*found, 0.1, 4.0)


def test_every_position_has_one_verdict():
    shape = (40, 40)
    tissue = slides.box(*shape, 0, 0, 40, 20)
    ink = slides.box(*shape, 0, 20, 20, 40)
    black = slides.box(*shape, 20, 20, 40, 30)
    found = candidates(masks(tissue, ink, black), (400, 400), 100, 0, 0.5)
    assert found.verdict.reshape(4, 4).tolist() == [[""] * 4, [""] * 4, ["ink"] * 2 + ["black"] * 2] + [
        ["ink"] * 2 + ["background"] * 2
    ]
    assert sum(found.rejected().values()) + len(found.kept()) == 16 == len(found.coords)
    assert found.kept().tolist() == [[x, y] for y in (0, 100) for x in (0, 100, 200, 300)]
    assert found.kept().dtype == np.int32


def test_tissue_beyond_the_last_whole_tile_is_counted():
    found = candidates(masks(np.ones((45, 45), bool)), (450, 450), 100, 0, 0.5)
    assert len(found.kept()) == 16 and found.rejected()["edge"] == 8 and found.rejected()["background"] == 1
    assert (found.kept() + 100 <= 450).all()


def test_overlapping_tiles_share_the_overlap():
    found = candidates(masks(np.ones((40, 40), bool)), (400, 400), 100, 25, 0.5)
    assert np.unique(found.kept()[:, 0]).tolist() == [0, 75, 150, 225, 300]


def test_a_tile_with_tissue_and_some_ink_is_left_out_for_the_ink():
    tissue = np.ones((40, 40), bool)
    ink = slides.box(40, 40, 0, 0, 3, 40)
    found = candidates(masks(tissue & ~ink, ink), (400, 400), 200, 0, 0.5)
    assert found.verdict.tolist() == ["ink", "", "ink", ""]


def tile(blur=0.0, seed=0, contrast=1.0):
    image = slides.stain(slides.glass(256, 256), np.ones((256, 256), bool), seed).astype(np.float32)
    image = ndimage.gaussian_filter(image, (blur, blur, 0)) if blur else image
    return (128 + contrast * (image - 128)).clip(0, 255).astype(np.uint8)


def test_sharpness_is_the_ratio_of_two_energies():
    image = tile()
    light = image.astype(np.float64) @ [0.299, 0.587, 0.114]
    laplacian = ndimage.laplace(light)[1:-1, 1:-1]
    gradient = sum(part[1:-1, 1:-1] ** 2 for part in np.gradient(light))
    assert focus.sharpness(image) == pytest.approx((laplacian**2).mean() / (gradient.mean() + 5), rel=1e-3)
    assert focus.sharpness(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)) == pytest.approx(
        20, rel=0.1
    )


def test_sharpness_falls_with_defocus_and_not_with_contrast():
    values = [focus.sharpness(tile(blur)) for blur in (0, 2, 4, 8)]
    assert values[0] > 3 * values[1] and values[1] < 1 and max(values[2:]) < 0.4, (
        "also for a tile without any structure"
    )
    assert focus.sharpness(tile(contrast=0.4)) == pytest.approx(values[0], rel=0.1)
    half = tile()
    half[:, 128:] = slides.glass(256, 128)
    assert focus.sharpness(half) > 0.6 * values[0], "glass beside tissue is no blur"


def test_blurred_tiles_are_those_far_below_the_slides_own():
    values = np.array([5.0] * 10 + [4.5, 1.0, 0.5, 0.05])
    assert np.flatnonzero(focus.blurred(values, 0.15)).tolist() == [12, 13]
    assert not focus.blurred(values, 0).any() and focus.blurred(np.zeros(0), 0.15).shape == (0,)
    assert focus.blurred(np.full(20, 0.001), 0.15).all(), "a slide without any sharp tile"
    assert focus.blurred(np.array([5.0, 0.8]), 0.2).tolist() == [False, False], "too few to know what is typical"
