"""Round trips, partial reads, atomicity and refusals of the dataset writer and the bag reader."""

import concurrent.futures
import errno
import json
import pathlib
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines import codec
from data_pipelines.bag import NO_COORDS, permutation
from data_pipelines.errors import BagError, DataError, DatasetExistsError, ManifestError, ShardReadError, StorageError
from data_pipelines.manifest import Manifest, manifest_bytes, sha256_file
from data_pipelines.reader import BagReader
from data_pipelines.writer import DatasetWriter

DIM, CHUNK = 6, 4
SIZES = (5, 23, 1, 8)


def _bags(sizes=SIZES, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n, dim)).astype(np.float32), rng.integers(0, 9999, (n, 2)).astype(np.int64)) for n in sizes
    ]


def _write(directory, bags, *, name="toy", seed=3, **options):
    with DatasetWriter(directory, name=name, feat_dim=DIM, chunk_patches=CHUNK, seed=seed, **options) as writer:
        for i, (features, coords) in enumerate(bags):
            writer.add(f"slide{i}", f"case{i // 2}", features, coords, source=f"file {i}, \n\u2028 and more")
    return directory


@pytest.fixture
def dataset(tmp_path):
    return _write(tmp_path / "toy", _bags(), shard_bytes=100)


def _shard_of(manifest, slide):
    return manifest.directory / manifest.shards[manifest.slides[slide].shard].file


def _declare_shard(dataset, shard):
    """Makes the manifest agree with the present size and checksum of a shard file, but not with its record count."""
    facts = json.loads((dataset / "manifest.json").read_text())
    path = dataset / facts["shards"][shard]["file"]
    facts["shards"][shard] |= {"n_bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (dataset / "manifest.json").write_bytes(manifest_bytes(facts))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 30])
def test_round_trip(tmp_path, dtype, shard_bytes):
    bags = _bags()
    manifest = Manifest.load(_write(tmp_path, bags, dtype=dtype, shard_bytes=shard_bytes))
    reader = BagReader(manifest)
    assert manifest.sizes.tolist() == list(SIZES) and manifest.sizes.dtype == np.int64
    assert [s.case_id for s in manifest.slides] == ["case0", "case0", "case1", "case1"]
    assert manifest.slides[1].source == "file 1, \n\u2028 and more"
    for i, (features, coords) in enumerate(bags):
        found, xy = reader.read_bag(i)
        order = permutation(3, f"slide{i}", len(features))
        np.testing.assert_array_equal(found, features[order].astype(dtype), strict=True)
        np.testing.assert_array_equal(xy, coords[order].astype(np.int32), strict=True)


def test_stored_order_is_a_seeded_permutation_and_coords_follow(tmp_path):
    n = 1000
    features = np.arange(n, dtype=np.float32)[:, None] * np.ones((1, DIM), np.float32)
    coords = np.stack([np.arange(n), -np.arange(n)], 1)
    _write(tmp_path, [(features, coords), (features, coords)])
    (first, xy), (second, _) = map(BagReader(tmp_path).read_bag, (0, 1))
    np.testing.assert_array_equal(first[:, 0], xy[:, 0])
    np.testing.assert_array_equal(np.sort(xy[:, 0]), np.arange(n))
    assert not np.array_equal(first, second), "two slides share one order"
    assert not np.array_equal(permutation(3, "a", n), permutation(4, "a", n)), "the seed has no effect"
    # Any run is a uniform sample: the mean rank of the first half lies within 5 standard errors of the centre.
    error = n / np.sqrt(12) * np.sqrt(1 / (n // 2) - 1 / n)
    assert abs(xy[: n // 2, 0].mean() - (n - 1) / 2) < 5 * error


def test_permutation_is_pinned_across_versions():
    assert permutation(0, "slide", 8).tolist() == [0, 3, 6, 5, 2, 4, 7, 1]


def test_partial_and_wrapping_reads_equal_slices_of_the_whole_bag(dataset):
    reader = BagReader(dataset)
    for slide, n in enumerate(SIZES):
        whole, xy = reader.read_bag(slide)
        for start in (0, 1, CHUNK, n - 1, n, 3 * n + 2):
            for count in (0, 1, 3, n, n + 1, 2 * n + 5):
                out, coords = np.full((count, DIM), 7, np.float32), np.full((count, 2), 7, np.int32)
                reader.read_into(slide, start, count, out, coords)
                rows = (start + np.arange(count)) % n
                np.testing.assert_array_equal(out, whole[rows].astype(np.float32))
                np.testing.assert_array_equal(coords, xy[rows])


def test_partial_read_touches_only_the_records_it_needs(dataset):
    reader, read = BagReader(dataset), []
    shard = reader.manifest.slides[1].shard

    class Spy:
        def __init__(self, inner):
            self.inner = inner

        def read(self, indices):
            read.extend(indices)
            return self.inner.read(indices)

    reader._readers[shard] = Spy(reader._shard(shard))
    first = reader.manifest.slides[1].first_record
    reader.read_into(1, 5, 4, np.empty((4, DIM), np.float16))
    assert read == [first + 1, first + 2]
    read.clear()
    reader.read_into(1, 0, 50, np.empty((50, DIM), np.float16))
    assert read == [first + i for i in range(6)], "a wrapping read must read each record once"


def test_reads_into_a_view_of_a_larger_buffer(dataset):
    reader = BagReader(dataset)
    buffer = np.full((10, DIM), -1, np.float16)
    reader.read_into(0, 0, 5, buffer[2:7])
    np.testing.assert_array_equal(buffer[2:7], reader.read_bag(0)[0])
    assert (buffer[:2] == -1).all() and (buffer[7:] == -1).all()


def test_missing_coords_are_marked(tmp_path):
    with DatasetWriter(tmp_path, name="x", feat_dim=DIM) as writer:
        writer.add("s", "c", np.zeros((3, DIM), np.float16))
    assert (BagReader(tmp_path).read_bag(0)[1] == NO_COORDS).all()


def test_reader_pickles_and_is_thread_safe(dataset):
    reader = pickle.loads(pickle.dumps(BagReader(dataset)))
    expected = [BagReader(dataset).read_bag(i)[0] for i in range(len(SIZES))]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: reader.read_bag(i % len(SIZES))[0], range(200)))
    for i, bag in enumerate(found):
        np.testing.assert_array_equal(bag, expected[i % len(SIZES)])


def test_equal_input_gives_equal_bytes(tmp_path):
    first, second = (_write(tmp_path / d, _bags(), shard_bytes=100, encoder={"name": "e"}) for d in ("a", "b"))
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    assert {"manifest.json", "slides.csv", "features.json", "dataset_info.json"} < set(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


# Atomicity.

KILLED = """
    import os, sys, numpy as np
    from data_pipelines import atomic
    from data_pipelines.writer import DatasetWriter
    replace, calls = os.replace, []
    def dying(*args):
        calls.append(args)
        if len(calls) > int(sys.argv[2]):
            os._exit(9)
        replace(*args)
    os.replace = dying
    with DatasetWriter(sys.argv[1], name="x", feat_dim=6, chunk_patches=4, overwrite=True) as writer:
        for i in range(3):
            writer.add(f"s{i}", "c", np.ones((9, 6), np.float16))
            if sys.argv[2] == "-1":
                os._exit(9)
    """


@pytest.mark.parametrize("renames", [-1, 0, 1, 4])
def test_killed_writer_leaves_nothing_that_loads(tmp_path, renames):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), str(renames)]
    assert subprocess.run(command, cwd=pathlib.Path(__file__).parents[2]).returncode == 9
    assert any(tmp_path.iterdir()), "the writer died before it wrote anything: the test is void"
    with pytest.raises(ManifestError, match="does not exist"):
        Manifest.load(tmp_path)
    _write(tmp_path, _bags())
    assert not list(tmp_path.glob(".writing-*")), "temporaries of the dead writer are still there"
    BagReader(tmp_path).manifest.check_shards(full=True)


@pytest.mark.parametrize("renames", [-1, 0, 2, 4])
def test_killed_replacement_leaves_the_old_dataset_or_none(dataset, renames):
    before = Manifest.load(dataset).fingerprint()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(dataset), str(renames)]
    assert subprocess.run(command, cwd=pathlib.Path(__file__).parents[2]).returncode == 9
    if renames == -1:
        assert Manifest.load(dataset).fingerprint() == before
        BagReader(dataset).manifest.check_shards(full=True)
    else:
        with pytest.raises(ManifestError, match="does not exist"):
            Manifest.load(dataset)


def test_exception_inside_the_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        with DatasetWriter(tmp_path, name="x", feat_dim=DIM) as writer:
            writer.add("s", "c", np.ones((3, DIM)))
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_complete_dataset_is_not_overwritten_unasked(dataset):
    before = Manifest.load(dataset).fingerprint()
    with pytest.raises(DatasetExistsError, match="overwrite=True"):
        DatasetWriter(dataset, name="x", feat_dim=DIM)
    with pytest.raises(BagError):
        with DatasetWriter(dataset, name="x", feat_dim=DIM, overwrite=True) as writer:
            writer.add("s", "c", np.ones((0, DIM)))
    assert Manifest.load(dataset).fingerprint() == before, "a failed replacement damaged the old dataset"


def test_overwrite_replaces_shards_and_keeps_tables(dataset):
    (dataset / "tables").mkdir()
    (dataset / "tables" / "labels.csv").write_text("case_id,er\n")
    _write(dataset, _bags((2,)), overwrite=True)
    assert len(list(dataset.glob("patches-train*"))) == 1
    assert BagReader(dataset).read_bag(0)[0].shape == (2, DIM)
    assert (dataset / "tables" / "labels.csv").exists()


def test_dataset_without_slides_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least one"):
        with DatasetWriter(tmp_path, name="x", feat_dim=DIM):
            pass
    with pytest.raises(ManifestError):
        Manifest.load(tmp_path)


def _limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_disk_full_is_reported_and_leaves_nothing(tmp_path):
    code = """
        import sys, numpy as np
        from data_pipelines.writer import DatasetWriter
        with DatasetWriter(sys.argv[1], name="x", feat_dim=512) as writer:
            for i in range(4):
                writer.add(f"s{i}", "c", np.random.default_rng(0).normal(size=(256, 512)))
        """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, preexec_fn=_limit_file_size, capture_output=True, text=True)
    assert "StorageError" in done.stderr and "free some space" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unwritable_directory_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="is writable") as caught:
        with DatasetWriter(tmp_path / "file" / "data", name="x", feat_dim=DIM):
            pass
    assert caught.value.errno == errno.ENOTDIR


# Refused bags.


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5, -65520.0])
@pytest.mark.parametrize("row", [0, CHUNK + 2])
def test_values_that_cannot_be_stored_name_slide_row_and_column(tmp_path, value, row):
    (features, coords), good = _bags((9,))[0], _bags((3,))[0]
    features[row, 5] = value
    with DatasetWriter(tmp_path, name="x", feat_dim=DIM, chunk_patches=CHUNK) as writer:
        writer.add("good", "c", *good)
        with pytest.raises(BagError, match=rf"slide 'bad': features\[{row}, 5\] is"):
            writer.add("bad", "c", features, coords)
        writer.add("also good", "c", *good)
    assert [s.slide_id for s in Manifest.load(tmp_path).slides] == ["good", "also good"]
    BagReader(tmp_path).read_bag(1)


def test_largest_float16_and_float32_range_are_accepted(tmp_path):
    with DatasetWriter(tmp_path / "16", name="x", feat_dim=DIM) as writer:
        writer.add("s", "c", np.full((1, DIM), 65504.0))
    assert (BagReader(tmp_path / "16").read_bag(0)[0] == 65504).all()
    with DatasetWriter(tmp_path / "32", name="x", feat_dim=DIM, dtype="float32") as writer:
        writer.add("s", "c", np.full((1, DIM), 1e5))
        with pytest.raises(BagError, match="float32"):
            writer.add("t", "c", np.full((1, DIM), 1e39))
    assert (BagReader(tmp_path / "32").read_bag(0)[0] == 1e5).all()


@pytest.mark.parametrize(
    "features,message",
    [
        (np.ones((0, DIM)), "bag is empty"),
        (np.ones((3, DIM + 1)), r"expected \[n, 6\]"),
        (np.ones(DIM), r"expected \[n, 6\]"),
        (np.ones((3, DIM), np.int64), "floating point"),
    ],
)
def test_malformed_features_are_refused(tmp_path, features, message):
    with pytest.raises(BagError, match=message):
        with DatasetWriter(tmp_path, name="x", feat_dim=DIM) as writer:
            writer.add("s", "c", features)


@pytest.mark.parametrize(
    "coords,message",
    [
        (np.zeros((2, 2), np.int32), r"expected integers \[3, 2\]"),
        (np.zeros((3, 2), np.float32), r"expected integers \[3, 2\]"),
        (np.array([[0, 0], [0, 1 << 31], [0, 0]]), r"coords\[1, 1\] is 2147483648"),
    ],
)
def test_malformed_coords_are_refused(tmp_path, coords, message):
    with pytest.raises(BagError, match=message):
        with DatasetWriter(tmp_path, name="x", feat_dim=DIM) as writer:
            writer.add("s", "c", np.ones((3, DIM)), coords)


@pytest.mark.parametrize("key", ["", " s", "a/b", "a\\b", "a\0b", "a\nb", "..", None])
def test_malformed_keys_are_refused(tmp_path, key):
    bag = np.ones((1, DIM))
    with DatasetWriter(tmp_path, name="x", feat_dim=DIM) as writer:
        with pytest.raises(BagError, match="slide_id is"):
            writer.add(key, "c", bag)
        with pytest.raises(BagError, match="case_id is"):
            writer.add("s", key, bag)
        writer.add("s", "c", bag)


def test_duplicate_slide_is_refused(tmp_path):
    with pytest.raises(BagError, match="slide 's' was added before"):
        with DatasetWriter(tmp_path, name="x", feat_dim=DIM) as writer:
            writer.add("s", "c", np.ones((1, DIM)))
            writer.add("s", "d", np.ones((1, DIM)))


@pytest.mark.parametrize(
    "options",
    [{"feat_dim": 0}, {"dtype": "int8"}, {"chunk_patches": 0}, {"chunk_patches": 1 << 28}, {"mpp": float("nan")}],
)
def test_bad_dataset_facts_are_refused(tmp_path, options):
    with pytest.raises(DataError):
        DatasetWriter(tmp_path, **({"name": "x", "feat_dim": DIM} | options))


# Damage to shards.


def test_flipped_bit_names_dataset_shard_and_record(dataset):
    reader = BagReader(dataset)
    path, record = _shard_of(reader.manifest, 1), reader.manifest.slides[1].first_record + 3
    payload = codec.decode(ArrayRecordReader(str(path)).read([record])[0], DIM, "float16").patches.tobytes()
    raw = bytearray(path.read_bytes())
    raw[raw.index(payload) + 2] ^= 4
    path.write_bytes(raw)
    fresh = BagReader(dataset)
    fresh.read_into(1, 0, 3 * CHUNK, np.empty((3 * CHUNK, DIM)))
    with pytest.raises(ShardReadError) as caught:
        fresh.read_bag(1)
    assert (caught.value.shard, caught.value.record) == (path.name, record)
    assert all(str(part) in str(caught.value) for part in (dataset, path.name, f"record {record}"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(ShardReadError, match="SHA-256"):
        fresh.manifest.check_shards(full=True)


def test_truncated_shard_is_named(dataset):
    manifest = Manifest.load(dataset)
    path = _shard_of(manifest, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ShardReadError, match=rf"{path.name}: has \d+ bytes"):
        Manifest.load(dataset)
    with pytest.raises(ShardReadError, match=rf"{path.name}: has \d+ bytes"):
        BagReader(manifest)
    _declare_shard(dataset, 1)
    with pytest.raises(ShardReadError, match=f"{path.name}: holds 0 records, the manifest says 6"):
        BagReader(dataset)


def test_missing_and_foreign_shard_are_named(dataset):
    manifest = Manifest.load(dataset)
    path = _shard_of(manifest, 1)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ShardReadError, match=path.name):
        BagReader(dataset)
    path.unlink()
    with pytest.raises(ShardReadError, match=f"{path.name}: cannot be opened"):
        Manifest.load(dataset)
    with pytest.raises(ShardReadError, match=f"{path.name}: cannot be opened"):
        BagReader(manifest)


def _rewrite_shard(dataset, change):
    """Replaces the records of the shard of slide 1 and makes size and checksum in the manifest agree with the file."""
    path = _shard_of(Manifest.load(dataset), 1)
    reader = ArrayRecordReader(str(path))
    records = change([reader.read([i])[0] for i in range(reader.num_records())])
    path.unlink()
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    _declare_shard(dataset, 1)
    return path.name


def test_record_count_is_checked_before_reading(dataset):
    name = _rewrite_shard(dataset, lambda records: records[:-1])
    with pytest.raises(ShardReadError, match=f"{name}: holds 5 records, the manifest says 6"):
        BagReader(dataset)


@pytest.mark.parametrize("damage", ["swapped", "other slide", "other size", "crc", "garbage"])
def test_record_that_is_not_the_promised_one_is_named(dataset, damage):
    patches, coords = np.ones((CHUNK, DIM), np.float16), np.zeros((CHUNK, 2), np.int32)
    crc = bytearray(codec.encode(patches, coords, "slide1", 2))
    crc[codec.PATCHES_OFFSET + 1] ^= 1
    changed = {
        "other slide": codec.encode(patches, coords, "slide9", 2),
        "other size": codec.encode(patches[:3], coords[:3], "slide1", 2),
        "crc": bytes(crc),
        "garbage": b"no record",
    }
    name = _rewrite_shard(
        dataset,
        lambda r: [r[0], r[1], r[3], r[2], *r[4:]] if damage == "swapped" else [*r[:2], changed[damage], *r[3:]],
    )
    expected = {"crc": "checksum mismatch", "garbage": "only 9 bytes"}.get(damage, "manifest and shard disagree")
    reader = BagReader(dataset)
    for _ in range(2):
        with pytest.raises(ShardReadError, match=f"{name}, record 2: .*{expected}"):
            reader.read_bag(1)
    if damage == "crc":
        BagReader(dataset, verify=False).read_bag(1)


def test_checksum_is_verified_once_per_record(dataset, monkeypatch):
    flags = []
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda *a, verify: flags.append(verify) or decode(*a, verify=verify))
    reader = BagReader(dataset)
    first = reader.read_bag(1)
    again = reader.read_bag(1)
    assert flags == [True] * 6
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_checked_record_that_changes_on_disk_is_refused(dataset):
    reader = BagReader(dataset)
    reader.read_bag(1)
    name = _rewrite_shard(dataset, lambda r: [r[0], r[1], r[3], r[2], *r[4:]])
    reader._readers.clear()
    with pytest.raises(ShardReadError, match=f"{name}, record 2: .*manifest and shard disagree"):
        reader.read_bag(1)


@pytest.mark.parametrize("slide", [-1, len(SIZES)])
def test_unknown_slide_is_refused(dataset, slide):
    with pytest.raises(DataError, match="does not exist, it has 4 slides"):
        BagReader(dataset).read_bag(slide)


@pytest.mark.parametrize("shape", [(3, DIM + 1), (2, DIM)])
def test_buffer_of_another_shape_is_refused(dataset, shape):
    reader = BagReader(dataset)
    with pytest.raises(DataError, match="out has shape"):
        reader.read_into(0, 0, 3, np.empty(shape))
    with pytest.raises(DataError, match="coords_out has shape"):
        reader.read_into(0, 0, 3, np.empty((3, DIM)), np.empty((3, 3), np.int32))


def test_copied_dataset_keeps_its_fingerprint(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    copy = BagReader(tmp_path / "copy")
    assert copy.manifest.fingerprint() == Manifest.load(dataset).fingerprint()
    np.testing.assert_array_equal(copy.read_bag(1)[0], BagReader(dataset).read_bag(1)[0])
