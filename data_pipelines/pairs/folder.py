"""Images straight from a folder, with the interface of a pair dataset: for predictions without an import."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.manifest import MANIFEST_FILE
from data_pipelines.pairs import pixels
from data_pipelines.pairs.labels import NONE, LabelRule
from data_pipelines.pairs.listing import Listing
from data_pipelines.pairs.manifest import Example, PairManifest
from data_pipelines.pairs.plan import Options, make_plan
from data_pipelines.pairs.reader import PairPixels, PairReader


def open_reader(data: pathlib.Path) -> PairReader | FolderReader:
    """The reader of a pair dataset, or of a folder (or table) of images that was not imported.

    Raises:
      ManifestError: a dataset that is inconsistent or of another kind.
      DataError: a folder without images, or with images of several sizes.
    """
    if (data / MANIFEST_FILE).exists():
        return PairReader(data)
    return FolderReader(data)


class FolderReader:
    """Reads and decodes image files on demand; no labels. Thread-safe.

    Args:
      source: folder or table, see `adapters`.
      resize: (height, width) that images are brought to; None: they must have one size.

    Attributes:
      manifest: as of a dataset, without shards; its fingerprint covers names and sizes of the files.

    Raises:
      DataError: nothing is found, or images of several sizes.
    """

    def __init__(self, source: pathlib.Path, resize: tuple[int, int] | None = None):
        options = Options(rule=LabelRule(NONE), missing_partner="keep", resize=resize)
        plan = make_plan(pathlib.Path(source), pathlib.Path(source).name, options)
        self._listing, self._resize = plan.listing, resize
        self.manifest = _manifest(plan.listing, plan.facts, plan.n_bytes)

    def read(self, row: int, *, partner: bool = True) -> PairPixels:
        """One example, see `reader.PairReader.read`.

        Raises:
          DataError: the file cannot be used; names it.
        """
        example = self._listing.examples[row]
        image = self._read(example.image, example.image_box)
        other = self._read(example.partner, example.partner_box) if partner and example.partner else None
        return PairPixels(image, other, None)

    def _read(self, file: str, box: tuple[int, int, int, int] | None) -> np.ndarray:
        try:
            image = pixels.encode((self._listing.root / file).read_bytes(), resize=self._resize, box=box)
        except pixels.UnusableImageError as error:
            raise DataError(
                f"{self._listing.root / file}: {error}; remove it, or import with `histokd pairs`"
            ) from error
        if (image.height, image.width) != self.manifest.image_size:
            found = f"{image.height}x{image.width}"
            raise DataError(f"{self._listing.root / file}: {found} pixels, expected {self.manifest.image_size}")
        return pixels.decode(image.data)


@dataclasses.dataclass(frozen=True)
class _FolderManifest(PairManifest):
    def fingerprint(self) -> str:
        return self.examples_sha256


def _manifest(listing: Listing, facts: Mapping, n_bytes: tuple[int, ...]) -> PairManifest:
    content = [[dataclasses.astuple(example), size] for example, size in zip(listing.examples, n_bytes)]
    examples = tuple(
        Example(e.example_id, e.group, e.split, -1, int(bool(e.partner)), 0, 0, row, e.image)
        for row, e in enumerate(listing.examples)
    )
    return _FolderManifest(
        directory=listing.root,
        name=facts["name"],
        image_size=tuple(facts["image_size"]),
        partner=listing.has_partners,
        vector_size=0,
        class_names=(),
        simulated=False,
        simulation=None,
        resized=None,
        notes="",
        examples=examples,
        shards=(),
        examples_sha256=hashlib.sha256(json.dumps([content, facts["image_size"]]).encode()).hexdigest(),
    )
