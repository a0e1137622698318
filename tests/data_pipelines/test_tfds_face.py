"""TensorFlow Datasets opens the very same files, without TensorFlow."""

import json
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from data_pipelines import tfds_face
from data_pipelines.manifest import Manifest, Shard
from data_pipelines.reader import BagReader
from data_pipelines.writer import DatasetWriter

READ = """
    import json, sys
    import numpy as np
    import tensorflow_datasets as tfds
    source = tfds.builder_from_directory(sys.argv[1]).as_data_source("train")
    records = [source[i] for i in range(len(source))]
    np.savez(sys.argv[2], **{f"{k}{i}": record[k] for i, record in enumerate(records) for k in record})
    print(json.dumps({"records": len(records), "tensorflow": "tensorflow" in sys.modules}))
    """


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_tfds_reads_equal_arrays_without_tensorflow(tmp_path, dtype):
    rng, directory = np.random.default_rng(0), tmp_path / "toy"
    with DatasetWriter(directory, name="toy", feat_dim=6, dtype=dtype, chunk_patches=4, shard_bytes=100) as writer:
        for i, n in enumerate((5, 9, 1)):
            writer.add(f"slide-é{i}", "c", rng.normal(size=(n, 6)), rng.integers(0, 99, (n, 2)))
    command = [sys.executable, "-c", textwrap.dedent(READ), str(directory), str(tmp_path / "out.npz")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found, reader = np.load(tmp_path / "out.npz"), BagReader(directory)
    assert json.loads(done.stdout) == {"records": 6, "tensorflow": False}
    record = 0
    for index, slide in enumerate(reader.manifest.slides):
        patches, coords = reader.read_bag(index)
        for chunk in range(slide.n_records):
            rows = slice(4 * chunk, 4 * chunk + 4)
            np.testing.assert_array_equal(found[f"patches{record}"], patches[rows], strict=True)
            np.testing.assert_array_equal(found[f"coords{record}"], coords[rows], strict=True)
            assert found[f"slide_id{record}"].item().decode() == slide.slide_id
            assert found[f"chunk{record}"] == chunk
            record += 1


def test_metadata_is_deterministic_and_describes_the_shards(tmp_path):
    shards = [Shard(tfds_face.shard_name(i, 2), 3 + i, 1000 + i, "") for i in range(2)]
    first, second = (tfds_face.metadata("toy", 6, "float16", shards) for _ in range(2))
    assert first == second
    (split,) = json.loads(first["dataset_info.json"])["splits"]
    assert split["name"] == "train" and split["shardLengths"] == ["3", "4"] and split["numBytes"] == "2001"
    patches = json.loads(first["features.json"])["featuresDict"]["features"]["patches"]["tensor"]
    assert patches == {"dtype": "float16", "encoding": "bytes", "shape": {"dimensions": ["-1", "6"]}}


def test_shards_carry_the_names_that_tfds_expects(tmp_path):
    with DatasetWriter(tmp_path, name="toy", feat_dim=6, shard_bytes=1) as writer:
        for i in range(3):
            writer.add(f"s{i}", "c", np.ones((2, 6)))
    names = [shard.file for shard in Manifest.load(tmp_path).shards]
    assert names == [f"patches-train.array_record-0000{i}-of-00003" for i in range(3)]
    assert sorted(p.name for p in pathlib.Path(tmp_path).glob(tfds_face.SHARD_GLOB)) == names
