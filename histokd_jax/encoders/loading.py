"""An encoder with its weights: from a checkpoint, from a folder of this library, or random."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.torch_file import read_state_dict
from histokd_jax.encoders import folder
from histokd_jax.encoders.presets import Encoder
from histokd_jax.encoders.torch_keys import Entry, Shape, Tensors, entries, plain_names
from histokd_jax.encoders.variables import fingerprint, flatten, unflatten
from histokd_jax.nn.encoders import build
from histokd_jax.nn.encoders.specs import ViTSpec

COUNTER = ".num_batches_tracked"
RANDOM = "RANDOM, NOT TRAINED"
_SHOWN = 8


class WeightsError(ValueError):
    """Weights that do not belong to the encoder; the message names the keys."""


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedEncoder:
    """An encoder that can be applied.

    Attributes:
      encoder: architecture and conventions.
      variables: float32 arrays: "params", and "batch_stats" if it has any.
      sha256: `variables.fingerprint`.
      weights: what the weights are, for people and manifests: a file name, or `RANDOM` and the seed.
      unused: keys of the checkpoint that the embedding does not need.
    """

    encoder: Encoder
    variables: Mapping[str, Any]
    sha256: str
    weights: str
    unused: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What a manifest records about the encoder, JSON-serialisable."""
        encoder = self.encoder
        facts = {
            "name": encoder.name,
            "licence": encoder.licence,
            "weights": self.weights,
            "weights_sha256": self.sha256,
            "architecture": folder.spec_facts(encoder.spec),
            "transform": dataclasses.asdict(encoder.transform),
            "trained_mpp": encoder.mpp,
        }
        return json.loads(json.dumps(facts))  # lists, as they are read back


def load(encoder: Encoder, path: pathlib.Path) -> LoadedEncoder:
    """Reads weights into an encoder.

    Args:
      encoder: which architecture the weights belong to.
      path: .safetensors, .pt, .pth or .bin of timm, torchvision or transformers. No code in it is run.

    Returns:
      The encoder with its weights.

    Raises:
      FileNotFoundError: no such file.
      WeightsError: missing or unknown keys, other shapes, or values that are no finite floating-point numbers.
      DataError: the file cannot be read.
    """
    variables, unused = from_torch(encoder, read_state_dict(path), str(path))
    return LoadedEncoder(encoder, variables, fingerprint(variables), pathlib.Path(path).name, unused)


def load_folder(path: pathlib.Path) -> LoadedEncoder:
    """Reads an encoder that this library wrote; see `folder.save`."""
    encoder, variables = folder.load(path)
    return LoadedEncoder(encoder, variables, fingerprint(variables), pathlib.Path(path).resolve().name)


def random(encoder: Encoder, seed: int) -> LoadedEncoder:
    """The encoder with random weights, to try the machinery; its embeddings mean little."""
    variables = unflatten({k: np.asarray(v) for k, v in flatten(build.init(encoder.spec, seed)).items()})
    return LoadedEncoder(encoder, variables, fingerprint(variables), f"{RANDOM} (seed {seed})")


def from_torch(encoder: Encoder, state: Tensors, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Turns a state dict into the variables of an encoder; every key is used exactly once or named.

    Args:
      encoder: which architecture the weights belong to.
      state: {key: tensor}.
      where: the file, for messages.

    Returns:
      (float32 variables, keys of the checkpoint that the embedding does not need).

    Raises:
      WeightsError: see `load`.
    """
    named, wanted = plain_names(state), entries(encoder.spec)
    own = {path: tuple(leaf.shape) for path, leaf in flatten(build.shapes(encoder.spec)).items()}
    missing = [entry.key for entry in wanted if entry.key not in named]
    rest = sorted(set(named) - {entry.key for entry in wanted})
    unused = [key for key in rest if key.startswith(encoder.unused) or key.endswith(COUNTER)] if rest else []
    unknown = [key for key in rest if key not in unused]
    shapes = [problem for entry in wanted if entry.key in named for problem in _misfit(encoder, entry, named, own)]
    _refuse(encoder, where, missing, unknown, shapes)
    _check_values(named, [entry.key for entry in wanted], where)
    return unflatten(_assemble(wanted, named, own)), tuple(unused)


def _misfit(encoder: Encoder, entry: Entry, named: Tensors, own: Mapping[str, Shape]) -> list[str]:
    found = tuple(named[entry.key].shape)
    expected = entry.shape(own[entry.path][entry.layer is not None :], getattr(encoder.spec, "patch", 0))
    if found == expected:
        return []
    if entry.key == "pos_embed" and len(found) == 3 and found[2] == expected[2]:
        return [f"pos_embed has {_positions(encoder.spec, found[1])}"]
    return [f"{entry.key} has shape {found}, expected {expected}"]


def _positions(spec: ViTSpec, rows: int) -> str:
    """Explains a position embedding of another length, with the settings under which it would fit."""
    covered = "with" if spec.embed_prefix else "without"
    told = f"{rows} rows, expected {spec.positions} ({spec.grid} x {spec.grid} patches, {covered} class and registers)"
    for embed_prefix in (spec.embed_prefix, not spec.embed_prefix):
        grid = round(max(0, rows - spec.prefix * embed_prefix) ** 0.5)
        if grid and grid**2 + spec.prefix * embed_prefix == rows:
            changes = [f"image={grid * spec.patch}"] * (grid != spec.grid)
            changes += [f"embed_prefix={str(embed_prefix).lower()}"] * (embed_prefix != spec.embed_prefix)
            return f"{told}; they would fit with {' and '.join(f'--spec {change}' for change in changes)}"
    return told


def _refuse(
    encoder: Encoder, where: str, missing: Sequence[str], unknown: Sequence[str], shapes: Sequence[str]
) -> None:
    parts = [f"missing keys: {_shown(missing)}"] if missing else []
    parts += [f"unknown keys: {_shown(unknown)}"] if unknown else []
    parts += [f"other shapes: {_shown(shapes)}"] if shapes else []
    if parts:
        raise WeightsError(
            f"{where}: not weights of the encoder {encoder.name}; {'; '.join(parts)}. Choose the encoder that the "
            f"weights belong to"
        )


def _shown(keys: Sequence[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _check_values(named: Tensors, keys: Sequence[str], where: str) -> None:
    for key in keys:
        if named[key].dtype.kind != "f":
            raise WeightsError(f"{where}: {key} holds {named[key].dtype}, expected floating-point numbers")
        if not np.isfinite(named[key]).all():
            raise WeightsError(f"{where}: {key} holds NaN or infinite values: is the file damaged?")


def _assemble(wanted: Sequence[Entry], named: Tensors, own: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """Variables by path; those of the blocks are stacked."""
    flat = {}
    for entry in wanted:
        value = entry.convert(named[entry.key])
        if entry.layer is None:
            flat[entry.path] = np.ascontiguousarray(value)
        else:
            flat.setdefault(entry.path, np.empty(own[entry.path], np.float32))[entry.layer] = value
    return flat
