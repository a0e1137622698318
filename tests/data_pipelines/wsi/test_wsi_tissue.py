"""Tissue on painted overviews: pen marks, black borders, white frames, shadows, stains, nothing at all."""

import numpy as np
import pytest
import wsi_slides as slides
from scipy import ndimage

from data_pipelines.errors import DataError
from data_pipelines.wsi.tissue import NoTissue, TissueOptions, background, clean, otsu, segment

SHAPE = (400, 500)
MPP = 4.0
TISSUE = slides.ellipse(*SHAPE, (200, 200), (120, 130))
INKS = {
    "blue": (45, 60, 165),
    "navy": (20, 25, 110),
    "light blue": (40, 130, 200),
    "green": (30, 130, 70),
    "red": (210, 25, 45),
    "black": (35, 35, 40),
}


def painted(colour=slides.GLASS, seed=0):
    """Fine texture as it looks on an overview: nuclei are smaller than a pixel."""
    picture = slides.glass(*SHAPE, colour, seed)
    picture[TISSUE] = (slides.stain(picture.copy(), TISSUE, seed) * 0.5 + np.array([200, 140, 185]) * 0.5)[TISSUE]
    return picture


def over(picture, mask, colour):
    picture = picture.copy()
    picture[mask] = np.asarray(colour) + np.random.default_rng(3).integers(-4, 5, (mask.sum(), 3))
    return ndimage.gaussian_filter(picture.astype(float), (0.7, 0.7, 0)).round().astype(np.uint8)


def dice(one, other):
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def find(picture, **options):
    return segment(picture, MPP, TissueOptions(**options))


def test_tissue_is_found_where_it_was_painted():
    found = find(painted())
    assert dice(found.tissue, TISSUE) > 0.97 and not found.ink.any() and not found.black.any()
    assert found.tissue_mm2 == pytest.approx(TISSUE.sum() * 16e-6, rel=0.05)


@pytest.mark.parametrize("colour", [(225, 222, 228), (235, 230, 215), (250, 250, 250), (215, 225, 235)])
def test_the_colour_of_the_glass_does_not_matter(colour):
    assert dice(find(painted(colour)).tissue, TISSUE) > 0.97


@pytest.mark.parametrize(
    "tissue", [(245, 215, 232), (150, 110, 175), (130, 85, 60), (170, 175, 215)], ids=["pale", "dark", "DAB", "blue"]
)
def test_pale_dark_and_other_stains_are_tissue(tissue):
    found = find(over(slides.glass(*SHAPE), TISSUE, tissue))
    assert dice(found.tissue, TISSUE) > 0.95 and not found.ink.any() and not found.black.any()


@pytest.mark.parametrize("name", INKS)
def test_pen_marks_on_glass_are_not_tissue(name):
    mark = slides.box(*SHAPE, 380, 40, 400, 360) | slides.box(*SHAPE, 380, 40, 480, 60)
    found = find(over(painted(), mark, INKS[name]))
    assert not (found.tissue & mark).any() and dice(found.tissue, TISSUE) > 0.97
    assert ((found.ink | found.black) & mark).sum() > 0.95 * mark.sum()


@pytest.mark.parametrize("name", INKS)
def test_pen_marks_across_tissue_are_cut_out_and_the_rest_stays(name):
    mark = slides.box(*SHAPE, 60, 190, 340, 206)
    found = find(over(painted(), mark, INKS[name]))
    assert not (found.tissue & mark).any()
    away = TISSUE & ~ndimage.binary_dilation(mark, iterations=12)
    assert (found.tissue & away).sum() > 0.97 * away.sum()


@pytest.mark.parametrize("name", INKS)
def test_transparent_ink_over_tissue_is_recognised_too(name):
    """What an ink lets through is multiplied with what the tissue lets through."""
    mark = slides.box(*SHAPE, 60, 190, 340, 206)
    picture = painted()
    through = np.where(mark[..., None], np.asarray(INKS[name]) / 243, 1.0)
    found = find((picture * ndimage.gaussian_filter(through, (0.7, 0.7, 0))).round().astype(np.uint8))
    assert (found.tissue & mark).sum() < 0.02 * mark.sum()
    away = TISSUE & ~ndimage.binary_dilation(mark, iterations=16)
    assert (found.tissue & away).sum() > 0.97 * away.sum()


def test_ink_is_kept_on_request():
    mark = slides.box(*SHAPE, 380, 40, 400, 360)
    assert find(over(painted(), mark, INKS["green"]), ink=False).tissue[mark].mean() > 0.9


def test_black_border_and_white_frame_are_no_tissue_and_do_not_move_the_threshold():
    plain = find(painted())
    for colour, width in (((0, 0, 0), 30), ((255, 255, 255), 30), ((12, 10, 14), 60)):
        frame = ~slides.box(*SHAPE, width, width, SHAPE[1] - width, SHAPE[0] - width)
        picture = painted()
        picture[frame] = colour
        found = find(picture)
        assert dice(found.tissue, TISSUE & ~frame) > 0.96, colour
        assert found.threshold == pytest.approx(plain.threshold, abs=0.03)
        assert found.black[frame].mean() > 0.9 if sum(colour) < 90 else not found.black.any()


def test_half_of_the_slide_black():
    picture = painted()
    picture[:, 340:] = 3
    assert dice(find(picture).tissue, TISSUE) > 0.96


def test_grey_shadows_dust_and_edges_of_the_cover_glass_are_no_tissue():
    picture = painted()
    shade = slides.box(*SHAPE, 360, 0, 480, 400)
    picture[shade] = (picture[shade] * 0.75).astype(np.uint8)
    picture[:, 350:352] = (120, 118, 121)
    assert dice(find(picture).tissue, TISSUE) > 0.97


def test_holes_and_pieces_by_their_area():
    picture = painted()
    small, large = slides.ellipse(*SHAPE, (150, 180), (8, 8)), slides.ellipse(*SHAPE, (230, 220), (30, 30))
    crumb, piece = slides.ellipse(*SHAPE, (420, 80), (10, 10)), slides.ellipse(*SHAPE, (420, 300), (30, 30))
    picture = over(over(picture, small | large, slides.GLASS), crumb | piece, (200, 130, 180))
    found = find(picture)
    assert found.tissue[small].mean() > 0.95 and found.tissue[large].mean() < 0.3
    assert found.tissue[crumb].mean() == 0 and found.tissue[piece].mean() > 0.9
    every = find(picture, min_area_um2=100, min_hole_um2=100)
    assert every.tissue[small].mean() < 0.8 and every.tissue[crumb].mean() > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_empty_glass_has_no_tissue(seed):
    with pytest.raises(NoTissue, match="no tissue") as caught:
        find(slides.glass(*SHAPE, seed=seed))
    assert caught.value.reason == "no tissue" and "threshold" in caught.value.detail


def test_ink_alone_is_no_tissue():
    with pytest.raises(NoTissue, match="ink covers"):
        find(over(slides.glass(*SHAPE), slides.box(*SHAPE, 100, 100, 300, 200), INKS["blue"]))


def test_a_slide_full_of_tissue_is_all_tissue():
    full = np.ones(SHAPE, bool)
    picture = slides.stain(slides.glass(*SHAPE), full)
    assert find(picture).tissue.mean() > 0.98


def fluorescent():
    picture = np.random.default_rng(0).integers(0, 3, (*SHAPE, 3)).astype(np.uint8)
    picture[..., 2] += (TISSUE * np.random.default_rng(1).integers(20, 160, SHAPE)).astype(np.uint8)
    return picture


def test_fluorescence_is_refused_with_its_reason_and_found_on_request():
    with pytest.raises(NoTissue, match="--tissue fluorescence") as caught:
        find(fluorescent())
    assert caught.value.reason == "dark background"
    assert dice(find(fluorescent(), mode="fluorescence").tissue, TISSUE) > 0.95


def test_everything_on_request():
    assert find(slides.glass(*SHAPE), mode="all").tissue.all()


def test_otsu_equals_the_exhaustive_search():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.05, 0.02, 900), rng.normal(0.3, 0.05, 300)]).clip(0, 0.6)
    edges = np.linspace(0, 0.6, 257)
    binned = ((edges[:-1] + edges[1:]) / 2)[
        np.histogram(values, edges)[1].searchsorted(values, "right").clip(1, 256) - 1
    ]
    within = [
        sum(part.var() * len(part) for part in (binned[binned < edge], binned[binned >= edge]) if len(part))
        for edge in edges[1:-1]
    ]
    assert otsu(values, 0.6) == pytest.approx(edges[1:-1][np.argmin(within)])
    assert otsu(np.zeros(0), 1.0) == 0


def test_background_is_the_glass_and_not_the_frame():
    picture = slides.glass(200, 200, (228, 226, 232))
    picture[:40] = 255
    picture[160:] = 0
    np.testing.assert_allclose(background(picture), (230, 228, 234), atol=2)
    np.testing.assert_allclose(background(np.full((9, 9, 3), 255, np.uint8)), 255)


def test_cleaning_keeps_what_touches_the_border():
    mask = np.ones((50, 50), bool)
    mask[:3, 20:30] = False
    assert not clean(mask, 4.0, 100, 10_000)[0, 25]


@pytest.mark.parametrize("options", [{"mode": "x"}, {"mpp": 0}, {"min_area_um2": -1}, {"threshold": -0.1}])
def test_bad_options_are_refused(options):
    with pytest.raises(DataError, match="tissue"):
        TissueOptions(**options)
