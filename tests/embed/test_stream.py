"""Tiles in order from several threads, within bounds; a slide that fails is left out alone."""

import threading

import numpy as np
import pytest

from data_pipelines.errors import DataError
from histokd_jax.embed import stream
from histokd_jax.embed.stream import Job
from histokd_jax.embed.transform import Stain

EDGE = 4


class Tiles:
    """A source whose tile i of slide s has the value 10 s + i; remembers what happened."""

    def __init__(self, slide, log, bad=None):
        self.slide, self.log, self.bad = slide, log, bad
        log.append(("open", slide))

    def read(self, index):
        if index == self.bad:
            raise DataError(f"slide {self.slide}: tile {index}")
        self.log.append(("read", self.slide))
        return np.full((EDGE, EDGE, 3), (10 * self.slide + index) % 256, np.uint8)

    def close(self):
        self.log.append(("close", self.slide))


class Mean:
    """Stands for an encoder: the mean of a tile."""

    def __init__(self, batch, stain=None):
        self.batch, self.stain, self.calls = batch, stain, []

    def __call__(self, tiles, parameters):
        assert tiles.shape == (self.batch, EDGE, EDGE, 3) and tiles.dtype == np.uint8
        self.calls.append((tiles[:, 0, 0, 0].tolist(), parameters))
        return tiles.mean((1, 2, 3), dtype=np.float32)[:, None] + (parameters or 0)


def jobs(counts, log, bad=None):
    bad = bad or {}
    return [
        Job(s, count, EDGE, lambda s=s: Tiles(s, log, bad.get(s)))
        for s, count in enumerate(counts)
    ]  # fmt: skip


def embedded(made, encoder, **options):
    return dict(stream.embed_jobs(made, encoder, **{"threads": 3, "ahead": 2} | options))


@pytest.mark.parametrize("threads", [1, 3])
def test_every_tile_is_embedded_once_and_in_order(threads):
    log, steps = [], []
    found = embedded(jobs([7, 1, 8, 3], log), Mean(4), threads=threads, progress=steps.append)
    assert list(found) == [0, 1, 2, 3]
    for slide, count in enumerate([7, 1, 8, 3]):
        np.testing.assert_array_equal(found[slide][:, 0], 10 * slide + np.arange(count))
    assert sum(steps) == 19 and log.count(("read", 2)) == 8
    assert sorted(e for e in log if e[0] == "close") == [("close", s) for s in range(4)]


def test_batches_do_not_mix_slides_and_are_filled_with_black():
    encoder = Mean(4)
    embedded(jobs([5, 2], []), encoder)
    assert [call[0] for call in encoder.calls] == [[0, 1, 2, 3], [4, 0, 0, 0], [10, 11, 0, 0]]


def test_a_slide_with_an_unreadable_tile_is_left_out_alone():
    log = []
    found = embedded(jobs([6, 9, 5], log, bad={1: 6}), Mean(2))
    assert isinstance(found[1], DataError) and "slide 1: tile 6" in str(found[1])
    assert found[0].shape == (6, 1) and found[2].shape == (5, 1)
    assert ("close", 1) in log


def test_a_slide_that_cannot_be_opened_is_left_out_alone():
    def fail():
        raise DataError("no such slide")

    made = jobs([3, 3], [])
    found = embedded([made[0], Job(7, 5, EDGE, fail), made[1]], Mean(2))
    assert list(found) == [0, 7, 1] and isinstance(found[7], DataError)


def test_an_error_that_is_no_fault_of_the_data_ends_the_work():
    def fail():
        raise MemoryError("too much")

    with pytest.raises(MemoryError):
        embedded([Job(0, 5, EDGE, fail)], Mean(2))


def test_decoding_keeps_within_its_bound():
    log, encoder_calls = [], []

    class Slow(Mean):
        def __call__(self, tiles, parameters):
            encoder_calls.append(sum(kind == "read" for kind, _ in log))
            return super().__call__(tiles, parameters)

    list(stream.embed_jobs(jobs([400], log), Slow(4), threads=2, ahead=3))
    assert max(count - 4 * i for i, count in enumerate(encoder_calls)) <= 4 * 3


def test_breaking_off_closes_the_slide():
    log = []
    running = stream.embed_jobs(jobs([4, 100], log), Mean(2), threads=2, ahead=2)
    assert next(running)[0] == 0
    running.close()
    assert ("close", 1) in log or ("open", 1) not in log
    assert threading.active_count() < 20


def test_stains_are_fitted_once_per_slide_to_tiles_spread_over_it():
    seen = []

    def fit(tiles):
        seen.append(tiles[:, 0, 0, 0].tolist())
        if len(tiles) == 2:
            raise DataError("no stains")
        return float(len(seen))

    stain = Stain({}, fit, apply=lambda tiles, p: tiles, tiles=4)
    found = embedded(jobs([10, 2, 5], []), Mean(4, stain))
    assert seen == [[0, 3, 6, 9], [10, 11], [20, 21, 23, 24]]
    assert isinstance(found[1], DataError)
    np.testing.assert_allclose(found[0][:, 0], np.arange(10) + 1.0)
    np.testing.assert_allclose(found[2][:, 0], 20 + np.arange(5) + 3.0)
