"""`histokd embed` on Apache Beam writes the bytes of a local run; needs the extra `beam` (make test-beam)."""

import hashlib

import numpy as np
import pytest
import wsi_slides

from data_pipelines.wsi.coords import TileGrid, write_coords

TINY = ["--encoder", "vit_tiny", "--spec", "depth=1", "--spec", "width=12", "--spec", "heads=2", "--spec", "hidden=24"]
TINY += ["--random-weights", "0", "--batch", "8", "--threads", "2"]


@pytest.fixture
def beam():
    pytest.importorskip("openslide")
    return pytest.importorskip("apache_beam", reason="apache-beam is not installed: make test-beam runs this")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Three slides of a few tiles, one of them empty."""
    root = tmp_path_factory.mktemp("embed")
    for seed in range(3):
        name = f"TCGA-AA-000{seed}-DX1"
        wsi_slides.with_tissue(root / "slides" / f"{name}.tiff", seed, height=400, width=500)
        places = np.array([[0, 0], [64, 64], [128, 0], [128, 64]][: 2 + seed], np.int32)
        grid = TileGrid(name, places, 64, 64, 0.5, 20.0, 0.5)
        write_coords(root / "job" / "20x_64px_0px_overlap" / "patches" / f"{name}_patches.h5", grid)
    (root / "slides" / "TCGA-AA-0001-DX1.tiff").write_bytes(b"")
    return [str(root / "slides"), "--coords", str(root / "job"), *TINY]


def digests(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_embedding_on_beam_equals_the_local_run_byte_for_byte(beam, arguments, tmp_path, capsys, monkeypatch):
    from data_pipelines import planned_writer
    from histokd_jax.cli.main import main

    cut = planned_writer.plan_shards
    monkeypatch.setattr(planned_writer, "plan_shards", lambda sizes, limit: cut(sizes, 60))
    assert main(["embed", *arguments, "--out", str(tmp_path / "local" / "toy")]) == 3
    assert main(["embed", *arguments, "--out", str(tmp_path / "beam" / "toy"), "--beam=--runner=DirectRunner"]) == 3
    found = digests(tmp_path / "beam")
    assert found == digests(tmp_path / "local") and sum("array_record" in name for name in found) == 2
    capsys.readouterr()
    assert main(["embed", *arguments, "--out", str(tmp_path / "beam" / "toy"), "--beam=--runner=DirectRunner"]) == 3
    assert "was complete already" in capsys.readouterr().out
