"""`histokd tile` on Apache Beam leaves the files of a local run; needs the extra `beam` (make test-beam)."""

import hashlib

import pytest
import wsi_slides as slides

from data_pipelines.errors import DatasetExistsError

SMALL = ("--target-mpp", "1", "--tile-px", "64", "--min-area", "5000", "--workers", "1")


@pytest.fixture
def beam():
    pytest.importorskip("openslide")
    return pytest.importorskip("apache_beam", reason="apache-beam is not installed: make test-beam runs this")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three slides, one of them without tissue, and an empty file."""
    root = tmp_path_factory.mktemp("slides")
    for i in range(2):
        slides.with_tissue(root / f"TCGA-AA-000{i}-01Z-00-DX1.tiff", seed=i, height=500, width=600)
    slides.write(root / "empty.tiff", slides.glass(500, 600))
    (root / "zero.svs").touch()
    return root


def digests(out):
    """All files but the records, which hold the times of the slides."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and ".tiling" not in path.parts]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def tile(*arguments):
    from histokd_jax.cli.main import main

    return main(["tile", *map(str, arguments), *SMALL])


def test_tiling_on_beam_equals_the_local_run_byte_for_byte(beam, folder, tmp_path, capsys):
    assert tile(folder, "--out", tmp_path / "local") == 3
    assert tile(folder, "--out", tmp_path / "beam", "--beam=--runner=DirectRunner") == 3
    found = digests(tmp_path / "beam")
    assert found == digests(tmp_path / "local") and sum(name.endswith("_patches.h5") for name in found) == 2
    capsys.readouterr()
    assert tile(folder, "--out", tmp_path / "beam", "--beam=--runner=DirectRunner") == 3
    assert "(2 were done before)" in capsys.readouterr().out or found == digests(tmp_path / "beam")
    assert tile(folder, "--out", tmp_path / "beam") == 3 and digests(tmp_path / "beam") == found


def test_other_options_are_refused_on_beam_too(beam, folder, tmp_path):
    from data_pipelines.beam.tiling import tile_on_beam
    from data_pipelines.wsi.grid import TileOptions
    from data_pipelines.wsi.sources import find_slides
    from data_pipelines.wsi.tiling import TilingOptions

    job = tmp_path / "job"
    found = [source for source in find_slides(folder) if source.file == "empty.tiff"]
    tile_on_beam(folder, found, job, TilingOptions(TileOptions(1.0, 64)))
    with pytest.raises(DatasetExistsError, match="--overwrite"):
        tile_on_beam(folder, found, job, TilingOptions(TileOptions(1.0, 64, min_tissue=0.9)))
