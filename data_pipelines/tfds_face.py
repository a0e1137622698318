"""The public face of a dataset: the metadata with which TensorFlow Datasets opens the very same shards.

`tfds.builder_from_directory(directory).as_data_source("train")` then yields one chunk record per element, with keys
patches [n, D], coords [n, 2], slide_id, chunk and crc. TensorFlow is not needed, neither to write nor to read.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.manifest import Shard
from data_pipelines.schema import FEATURE_DTYPES

TFDS_NAME = "patches"
TFDS_VERSION = "1.0.0"
SPLIT = "train"
SHARD_GLOB = f"{TFDS_NAME}-{SPLIT}.array_record-*"
METADATA_FILES = ("features.json", "dataset_info.json")


def shard_name(index: int, count: int, name: str = TFDS_NAME, split: str = SPLIT) -> str:
    """File name of shard `index` of `count` of a split, in the naming scheme of TFDS."""
    return f"{name}-{split}.array_record-{index:05d}-of-{count:05d}"


def shard_glob(name: str) -> str:
    """Pattern of the shards of all splits of a TFDS name."""
    return f"{name}-*.array_record-*"


def metadata(name: str, feat_dim: int, dtype: str, shards: Sequence[Shard]) -> dict[str, bytes]:
    """The metadata files of TFDS; equal arguments give equal bytes.

    TFDS derives the splits from file names alone, so it is run on empty stand-ins in a scratch folder, and its output
    is put into a canonical form. The real shards are not touched.

    Args:
      name: name of our dataset, for the description. The TFDS name is always "patches".
      feat_dim: embedding width D.
      dtype: stored dtype.
      shards: the shards in order, under their final names.

    Returns:
      Content by file name: features.json and dataset_info.json.
    """
    text = f"Chunks of patch embeddings of the dataset {name!r}; slides.csv maps slides to records."
    return write_metadata(TFDS_NAME, {SPLIT: shards}, lambda tfds: _features(tfds, feat_dim, dtype), text)


def write_metadata(
    name: str, splits: Mapping[str, Sequence[Shard]], features: Callable[[Any], Any], description: str
) -> dict[str, bytes]:
    """As `metadata`, for records of any features and for several splits.

    Args:
      name: the TFDS name, which starts the file names of the shards.
      splits: split -> its shards in order, under their final names.
      features: (the module tensorflow_datasets) -> the features of a record.
      description: text about the dataset.

    Returns:
      Content by file name.
    """
    import tensorflow_datasets as tfds  # Seconds to import, and only writers need it.

    with tempfile.TemporaryDirectory() as scratch:
        infos = [_split_info(tfds, scratch, name, split, shards) for split, shards in splits.items()]
        tfds.folder_dataset.write_metadata(
            data_dir=scratch,
            features=features(tfds),
            split_infos=infos,
            version=TFDS_VERSION,
            check_data=False,
            description=description,
        )
        return {file: _canonical((pathlib.Path(scratch) / file).read_bytes()) for file in METADATA_FILES}


def _split_info(tfds: Any, scratch: str, name: str, split: str, shards: Sequence[Shard]) -> Any:
    for shard in shards:
        (pathlib.Path(scratch) / shard.file).touch()
    template = tfds.core.ShardedFileTemplate(
        dataset_name=name, data_dir=scratch, split=split, filetype_suffix="array_record"
    )
    return tfds.core.SplitInfo(
        name=split,
        shard_lengths=[shard.n_records for shard in shards],
        num_bytes=sum(shard.n_bytes for shard in shards),
        filename_template=template,
    )


def _features(tfds: Any, feat_dim: int, dtype: str) -> Any:
    return tfds.features.FeaturesDict(
        {
            "patches": tfds.features.Tensor(shape=(None, feat_dim), dtype=FEATURE_DTYPES[dtype], encoding="bytes"),
            "coords": tfds.features.Tensor(shape=(None, 2), dtype=np.int32, encoding="bytes"),
            "slide_id": tfds.features.Text(),
            "chunk": tfds.features.Scalar(dtype=np.int64),
            "crc": tfds.features.Scalar(dtype=np.int64),
        }
    )


def _canonical(content: bytes) -> bytes:
    return (json.dumps(json.loads(content), indent=1, sort_keys=True) + "\n").encode()
