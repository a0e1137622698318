"""Attention maps of models that read whole images, as tables and for pictures."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from data_pipelines import schema
from data_pipelines.table_files import write_csv
from histokd_jax.train import data_kinds, model_dir
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.types import Mode


@dataclasses.dataclass(frozen=True, eq=False)
class Attended:
    """One image and where the networks of a model look.

    Attributes:
      example_id: its key.
      image: [H, W, 3] uint8.
      partner: [H, W, 3] uint8, or None if no network read it.
      maps: mode -> [h, w] float32 over the grid of tokens; sums to 1.
    """

    example_id: str
    image: np.ndarray
    partner: np.ndarray | None
    maps: Mapping[str, np.ndarray]


def modes_of(folder: pathlib.Path) -> list[str]:
    """Modes of a model folder whose networks it holds.

    Raises:
      CheckpointMismatchError: it holds no model.
    """
    facts = model_dir.read_facts(folder)
    method = model_dir.rebuild(facts)[2]
    return [mode.name for mode in method.modes if _is_complete(folder, mode)]


def _is_complete(folder: pathlib.Path, mode: Mode) -> bool:
    return all((folder / group).is_dir() for group in mode.params)


def attend(folder: pathlib.Path, data: pathlib.Path, mode: str, limit: int | None = None) -> Iterator[Attended]:
    """Attention of one mode on every image of a data set, in its order.

    Args:
      folder: a model folder.
      data: a data set of image pairs, or a folder of images.
      mode: inference mode.
      limit: only the first images.

    Raises:
      ValueError: the method has no attention, or reads bags.
    """
    model = model_dir.load(folder, mode)
    if data_kinds.kind_of(model.cfg) != data_kinds.PAIRS or model.method.attention is None:
        raise ValueError(f"method {model.method.name} has no attention maps of images")
    new = data_kinds.new_data(model.cfg).open_new(model, mode, data)
    run = model.of_batches(lambda params, extra, batch: model.method.attention(params, {}, extra, batch, mode))
    done = 0
    for fed in new.feeder.evaluate(new.source):
        maps, batch = np.asarray(run(fed.batch)), jax.device_get(dict(fed.batch))
        for place in np.flatnonzero(fed.slide_index >= 0):
            if limit is not None and done >= limit:
                return
            example = new.manifest.examples[int(fed.slide_index[place])].example_id
            partner = batch[schema.PARTNER][place] if schema.PARTNER in batch else None
            yield Attended(example, batch[schema.IMAGE][place], partner, {mode: maps[place]})
            done += 1


def attend_all(folder: pathlib.Path, data: pathlib.Path, limit: int) -> list[Attended]:
    """Attention of every network of a model folder on the first images, side by side.

    Modes that the data cannot serve (no partners) are left out.

    Raises:
      ValueError: no mode is possible.
    """
    found: dict[str, Attended] = {}
    reasons = []
    for mode in modes_of(folder):
        try:
            for one in attend(folder, data, mode, limit):
                before = found.get(one.example_id, one)
                partner = one.partner if before.partner is None else before.partner
                found[one.example_id] = dataclasses.replace(before, partner=partner, maps={**before.maps, **one.maps})
        except (ValueError, CheckpointMismatchError) as error:
            reasons.append(f"{mode}: {error}")
    if not found:
        raise ValueError(f"no attention can be shown ({'; '.join(reasons)})")
    return list(found.values())


def write_tables(attended: Sequence[Attended] | Iterator[Attended], out: pathlib.Path) -> list[pathlib.Path]:
    """Writes one CSV per image: row and column of the token, and its attention; the files in order."""
    files = []
    for one in attended:
        (grid,) = one.maps.values()
        rows = ((row, column, repr(float(value))) for (row, column), value in np.ndenumerate(grid))
        path = out / f"{one.example_id.replace('/', '_')}.csv"
        write_csv(path, ("row", "column", "attention"), rows)
        files.append(path)
    return files
