"""Which tensors of a checkpoint a network takes: names and shapes compared, every deviation told by key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Tensors = Mapping[str, np.ndarray]
_SHOWN = 6


class ConversionError(ValueError):
    """A checkpoint that does not belong to the network; the message names the keys."""


@dataclasses.dataclass(frozen=True)
class Matched:
    """The tensors that a network takes from a checkpoint.

    Attributes:
      tensors: under the names that the network expects, all of them.
      dead: keys of tensors that the authors' code stores and never uses in a forward pass.
      cast: keys whose type is not that of our parameters.
    """

    tensors: Tensors
    dead: tuple[str, ...]
    cast: tuple[str, ...]

    def summary(self) -> str:
        """E.g. "99 of 104 tensors used; never used by the authors' code: ..."."""
        text = f"{len(self.tensors)} of {len(self.tensors) + len(self.dead)} tensors used"
        if self.dead:
            text += f"; stored but never used by the authors' code: {', '.join(self.dead)}"
        return text + (f"; converted to float32: {shown(self.cast)}" if self.cast else "")


def shown(keys: Sequence[str]) -> str:
    """The first few of many keys."""
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def plain(key: str) -> str:
    """A key without the segments `module`: torch.nn.DataParallel inserts one before the layers that it wraps."""
    return ".".join(part for part in key.split(".") if part != "module")


def match(
    state: Tensors, expected: Mapping[str, tuple[int, ...]], dead: Sequence[str], *, where: str, network: str
) -> Matched:
    """Compares a checkpoint with what a network expects.

    Args:
      state: {key: array}.
      expected: {key: shape} of all tensors of the network.
      dead: beginnings of keys that may be ignored.
      where: the file, for messages.
      network: its name, for messages.

    Returns:
      The tensors in the order of `expected`.

    Raises:
      ConversionError: missing or unknown keys, other shapes, or values that are no finite floating-point numbers.
    """
    names = _names(state, where)
    found = {key: names[plain(key)] for key in expected if plain(key) in names}
    missing = [key for key in expected if key not in found]
    rest = [name for name in state if name not in set(found.values())]
    ignored = [name for name in rest if plain(name).startswith(tuple(plain(d) for d in dead))] if dead else []
    unknown = [name for name in rest if name not in ignored]
    shapes = [
        f"{name} has shape {tuple(state[name].shape)}, expected {expected[key]}"
        for key, name in found.items()
        if tuple(state[name].shape) != expected[key]
    ]
    _refuse(where, network, missing, unknown, shapes)
    _check_values(state, tuple(found.values()), where)
    cast = tuple(name for name in found.values() if state[name].dtype != np.float32)
    return Matched({key: state[name] for key, name in found.items()}, tuple(ignored), cast)


def _names(state: Tensors, where: str) -> dict[str, str]:
    """Plain key -> key in the file."""
    names: dict[str, str] = {}
    for name in state:
        if names.setdefault(plain(name), name) != name:
            raise ConversionError(f"{where}: {names[plain(name)]} and {name} name the same layer")
    return names


def _refuse(where: str, network: str, missing: list[str], unknown: list[str], shapes: list[str]) -> None:
    parts = [f"missing keys: {shown(missing)}"] if missing else []
    parts += [f"unknown keys: {shown(unknown)}"] if unknown else []
    parts += [f"other shapes: {shown(shapes)}"] if shapes else []
    if parts:
        raise ConversionError(
            f"{where}: not a checkpoint of {network} with these settings; {'; '.join(parts)}. "
            "Choose the network and its options with --config"
        )


def _check_values(state: Tensors, names: Sequence[str], where: str) -> None:
    for name in names:
        if state[name].dtype.kind != "f":
            raise ConversionError(f"{where}: {name} holds {state[name].dtype}, expected floating-point numbers")
        if not np.isfinite(state[name]).all():
            raise ConversionError(f"{where}: {name} holds NaN or infinite values: was the training broken off?")
