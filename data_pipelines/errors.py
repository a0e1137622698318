"""Errors raised by the data layer. All of bad content derive from ValueError, all of failed storage from OSError."""


class DataError(ValueError):
    """Bad data or a bad request for data; the message names the place, the value, what was expected and the fix."""


class BagError(DataError):
    """A bag that cannot be stored: empty, wrong shape, NaN or Inf, out of the range of the stored dtype, bad key."""


class DatasetExistsError(DataError):
    """The target directory already holds a complete dataset."""


class ManifestError(DataError):
    """The manifest is missing, unreadable, or disagrees with itself or with the files beside it."""


class ShardReadError(DataError):
    """A record could not be read, or is not the record that the manifest promises.

    Attributes:
      dataset: directory of the dataset.
      shard: file name of the shard.
      record: index of the record within the shard, or None if the whole shard is meant.
    """

    def __init__(self, dataset: object, shard: str, record: int | None, reason: str):
        self.dataset, self.shard, self.record, self.reason = str(dataset), shard, record, reason
        where = shard if record is None else f"{shard}, record {record}"
        super().__init__(
            f"dataset {dataset}: {where}: {reason}; restore the shard from a copy or write the dataset again"
        )

    def __reduce__(self):
        # Exceptions are rebuilt from `args` by default, which do not match this signature; Grain ships them by pickle.
        return type(self), (self.dataset, self.shard, self.record, self.reason)


class StorageError(OSError):
    """Writing failed for want of space or permission, or another cause outside the data."""

    def __str__(self) -> str:
        # The number of the error stays in `errno`; in front of the message it only repeats what the message says.
        return self.strerror or super().__str__()
