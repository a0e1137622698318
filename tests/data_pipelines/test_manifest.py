"""Loading a manifest: what it holds, what it refuses, and what its fingerprint depends on."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines.errors import ManifestError, ShardReadError
from data_pipelines.manifest import Manifest, Slide
from data_pipelines.writer import DatasetWriter

FACTS = {
    "seed": 5,
    "encoder": {"name": "uni", "licence": "CC-BY-NC-ND-4.0"},
    "mpp": 0.5,
    "magnification": 20,
    "patch_size_level0": 512,
    "simulated": True,
    "simulation": {"signal": 0.3},
    "notes": "made for a test",
}


def _write(directory, value=0.0, **options):
    with DatasetWriter(directory, **({"name": "toy", "feat_dim": 4, "chunk_patches": 3} | options)) as writer:
        for i, n in enumerate((7, 2, 3)):
            writer.add(f"s{i}", f"c{i}", np.full((n, 4), value), source=f"{i}.svs")
    return directory


@pytest.fixture
def dataset(tmp_path):
    return _write(tmp_path / "toy", shard_bytes=300, **FACTS)


def _edit_facts(dataset, **changes):
    path = dataset / "manifest.json"
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in facts.items() if v != "DELETE"}))


def _edit_slides(dataset, old, new, keep_checksum=True):
    path = dataset / "slides.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    if keep_checksum:
        _edit_facts(dataset, slides_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_load_returns_what_was_written(dataset):
    manifest = Manifest.load(str(dataset))
    assert {name: getattr(manifest, name) for name in FACTS} == FACTS
    assert (manifest.name, manifest.feat_dim, manifest.dtype, manifest.chunk_patches) == ("toy", 4, "float16", 3)
    assert manifest.slides == (
        Slide("s0", "c0", 0, 0, 3, 7, "0.svs"),
        Slide("s1", "c1", 1, 0, 1, 2, "1.svs"),
        Slide("s2", "c2", 1, 1, 1, 3, "2.svs"),
    )
    assert [s.n_records for s in manifest.shards] == [3, 2]
    assert manifest.sizes.tolist() == [7, 2, 3] and not manifest.sizes.flags.writeable
    manifest.check_shards(full=True)


def test_files_hold_no_time_host_or_path(dataset):
    import platform

    for path in dataset.glob("*"):
        content = path.read_bytes()
        assert str(dataset).encode() not in content and (platform.node() or "?").encode() not in content, path.name


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"format_version": 2}, "format_version is 2, this library reads 1"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"n_slides": 4}, "n_slides is 4, slides.csv gives 3"),
        ({"n_patches": 11}, "n_patches is 11, slides.csv gives 12"),
        ({"slides_sha256": "00"}, "slides.csv: SHA-256 is .*, manifest.json says 00"),
        ({"feat_dim": "DELETE"}, "missing or unknown field .*feat_dim"),
        ({"shards": [{"file": "x"}]}, "missing or unknown field"),
        ({"chunk_patches": 2}, "row 2: .*expected 4"),
    ],
)
def test_inconsistent_manifest_json_is_refused(dataset, changes, message):
    _edit_facts(dataset, **changes)
    with pytest.raises(ManifestError, match=message):
        Manifest.load(dataset)


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("s1,c1", "s0,c1", "row 3: .*duplicate"),
        ("s1,c1,1,0,1,2", "s1,c1,1,1,1,2", "row 3: .*first_record should be 0"),
        ("s1,c1,1,0,1,2", "s1,c1,2,0,1,2", "row 3: .*no such shard"),
        ("s1,c1,1,0,1,2", "s1,c1,1,0,one,2", "row 3: .*invalid literal"),
        ("s1,c1,1,0,1,2", "s1,c1,1,0,1", "row 3: .*not a slide"),
        ("slide_id,case_id", "slide,case", "columns are"),
    ],
)
def test_inconsistent_slide_table_is_refused(dataset, old, new, message):
    _edit_slides(dataset, old, new)
    with pytest.raises(ManifestError, match=message):
        Manifest.load(dataset)


def test_edited_slide_table_is_refused(dataset):
    _edit_slides(dataset, "s1,c1", "s1,c9", keep_checksum=False)
    with pytest.raises(ManifestError, match="SHA-256"):
        Manifest.load(dataset)


def test_shards_that_no_slide_uses_up_are_refused(dataset):
    facts = json.loads((dataset / "manifest.json").read_text())
    facts["shards"][1]["n_records"] = 3
    _edit_facts(dataset, shards=facts["shards"])
    with pytest.raises(ShardReadError, match="the slides use 2 records, the manifest says 3"):
        Manifest.load(dataset)


@pytest.mark.parametrize("name", ["manifest.json", "slides.csv"])
def test_missing_or_broken_file_is_refused(dataset, name):
    (dataset / name).write_text("{")
    with pytest.raises(ManifestError, match=name):
        Manifest.load(dataset)
    (dataset / name).unlink()
    with pytest.raises(ManifestError, match=name):
        Manifest.load(dataset)


def test_fingerprint_depends_on_content_only(tmp_path):
    def fingerprint(directory, **options):
        return Manifest.load(_write(tmp_path / directory, **options)).fingerprint()

    reference = fingerprint("a")
    assert fingerprint("b", name="other name", notes="other notes") == reference
    others = [
        fingerprint("c", value=1.0),
        fingerprint("d", seed=1),
        fingerprint("e", dtype="float32"),
        fingerprint("f", chunk_patches=4),
    ]
    assert len({reference, *others}) == 5


def test_importing_the_data_layer_touches_no_backend_and_no_optional_package():
    code = """
import sys
from data_pipelines import atomic, bag, codec, errors, manifest, reader, tfds_face, writer
loaded = {"tensorflow", "tensorflow_datasets", "openslide", "torch"} & set(sys.modules)
assert not loaded, loaded
bridge = sys.modules.get("jax._src.xla_bridge")
assert bridge is None or not bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.split("/tests/")[0])
