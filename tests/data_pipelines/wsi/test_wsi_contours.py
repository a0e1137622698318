"""Outlines: exact areas, closed simple rings, holes inside their piece; GeoJSON in level-0 pixels."""

import json

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.wsi.contours import geojson, regions, signed_area, well_composed


def random_mask(seed, shape=(60, 80)):
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return well_composed(field > 0.05 * (seed % 3))


def lattice(ring):
    """All points with whole coordinates along a ring of horizontal and vertical edges."""
    points = []
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0)):
        assert (x0 == x1) != (y0 == y1)
        steps = abs(x1 - x0) + abs(y1 - y0)
        points += [(x0 + (x1 - x0) * k // steps, y0 + (y1 - y0) * k // steps) for k in range(steps)]
    return points


def inside(rings, shape):
    """Even-odd rule at the centres of pixels, in float64."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    crossings = np.zeros(shape, int)
    for ring in rings:
        for (x0, y0), (_, y1) in zip(ring, np.roll(ring, -1, axis=0)):
            crossings += (min(y0, y1) < y) & (y < max(y0, y1)) & (x0 > x)
    return crossings % 2 == 1


@pytest.mark.parametrize("seed", range(4))
def test_outlines_enclose_the_mask_and_nothing_else(seed):
    mask = random_mask(seed)
    found = regions(mask)
    rings = [ring for piece in found for ring in (piece.outer, *piece.holes)]
    np.testing.assert_array_equal(inside(rings, mask.shape), mask)
    assert sum(piece.area for piece in found) == mask.sum()
    assert len(found) == ndimage.label(mask)[1] and [p.area for p in found] == sorted([p.area for p in found])[::-1]


@pytest.mark.parametrize("seed", range(4))
def test_rings_are_simple_and_do_not_touch_each_other(seed):
    found = regions(random_mask(seed))
    points = [point for piece in found for ring in (piece.outer, *piece.holes) for point in lattice(ring)]
    assert len(points) == len(set(points))


@pytest.mark.parametrize("seed", range(4))
def test_every_piece_owns_its_own_holes(seed):
    mask = random_mask(seed)
    labels, _ = ndimage.label(mask)
    for piece in regions(mask):
        own = inside([piece.outer, *piece.holes], mask.shape)
        assert len(np.unique(labels[own])) == 1 and (labels == labels[own][0]).sum() == own.sum()
        assert signed_area(piece.outer) > 0 and all(signed_area(ring) < 0 for ring in piece.holes)


def test_corner_contacts_are_filled_and_nothing_is_removed():
    checker = (np.add.outer(np.arange(9), np.arange(9)) % 2).astype(bool)
    filled = well_composed(checker)
    a, b, c, d = filled[:-1, :-1], filled[:-1, 1:], filled[1:, :-1], filled[1:, 1:]
    assert not ((a & d & ~b & ~c) | (b & c & ~a & ~d)).any() and (filled | checker == filled).all()


def test_straight_stretches_have_no_extra_points():
    mask = np.zeros((10, 12), bool)
    mask[2:8, 3:11] = True
    mask[4:6, 5:7] = False
    (piece,) = regions(mask)
    assert sorted(piece.outer.tolist()) == [[3, 2], [3, 8], [11, 2], [11, 8]]
    assert sorted(piece.holes[0].tolist()) == [[5, 4], [5, 6], [7, 4], [7, 6]] and piece.area == 44


def test_geojson_is_what_qupath_imports():
    mask = random_mask(1)
    found = json.loads(json.dumps(geojson(regions(mask), (16.5, 16.0))))
    assert found["type"] == "FeatureCollection" and len(found["features"]) == ndimage.label(mask)[1]
    area = 0.0
    for feature in found["features"]:
        assert feature["type"] == "Feature" and feature["geometry"]["type"] == "Polygon"
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Tissue"
        for number, ring in enumerate(feature["geometry"]["coordinates"]):
            assert ring[0] == ring[-1] and len(ring) >= 5
            assert all(isinstance(value, int) for point in ring for value in point)
            assert (signed_area(np.array(ring[:-1])) > 0) == (number == 0)
            area += signed_area(np.array(ring[:-1]))
    assert area == pytest.approx(mask.sum() * 16.5 * 16, rel=0.01)


def test_no_tissue_is_an_empty_collection():
    assert regions(np.zeros((5, 5), bool)) == [] and geojson([], (1.0, 1.0))["features"] == []
