"""The checkpoint names of every method, behind one interface. The key maps themselves lie with the networks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from histokd_jax.convert.matching import ConversionError, Tensors, find

Sizes = Mapping[str, tuple[str, int]]
"""Field of `DataSpec` -> (checkpoint key, axis) that shows it."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How the checkpoints of one network are named.

    Attributes:
      name: for messages.
      from_torch: {key: array} of exactly this network -> parameter tree.
      to_torch: the reverse.
      dead: beginnings of keys that the authors' code stores and never uses.
      sizes: where the widths of the data can be read off.
    """

    name: str
    from_torch: Callable[[Tensors], Mapping[str, Any]]
    to_torch: Callable[[Mapping[str, Any]], Tensors]
    dead: tuple[str, ...] = ()
    sizes: Sizes = dataclasses.field(default_factory=dict)

    def size(self, state: Tensors, field: str, where: str) -> int | None:
        """A width of the data as the tensors show it; None if they do not.

        Args:
          state: the checkpoint.
          field: of `DataSpec`.
          where: the file, for messages.

        Raises:
          ConversionError: the checkpoint lacks the key that shows it, or the key has too few axes.
        """
        if field not in self.sizes:
            return None
        key, axis = self.sizes[field]
        value = find(state, key)
        if value is None or value.ndim <= axis:
            what = "is missing" if value is None else f"has shape {value.shape}"
            raise ConversionError(f"{where}: not a checkpoint of {self.name}: {key} {what}")
        return int(value.shape[axis])


def adapters(cfg: ConfigDict) -> dict[str, Adapter]:
    """The networks of a method that have published checkpoints.

    Args:
      cfg: resolved configuration.

    Returns:
      Parameter group -> adapter.

    Raises:
      ConversionError: there are none for this method or network.
    """
    if cfg.method not in _METHODS:
        raise ConversionError(f"method {cfg.method!r} has no published checkpoints to convert; {sorted(_METHODS)} have")
    return _METHODS[cfg.method](cfg)


def _mkd(cfg: ConfigDict) -> dict[str, Adapter]:
    from histokd_jax.methods.mkd import torch_keys

    inputs = {"S_P": "_fc1.0.weight", "T_M": "wsi_net.0.weight"}
    heads = {"S_P": "classifier.fc.weight", "T_M": "classifier.weight"}
    heads["T_G"] = "abmil.classifier.fc.weight" if cfg.variant == "mkd" else "classifier.weight"
    found = {}
    for group, head in heads.items():
        options = dict(network=group, variant=cfg.variant, fusion=cfg.fusion.type)
        found[group] = Adapter(
            f"{cfg.variant} {group}",
            functools.partial(torch_keys.from_torch, **options),
            functools.partial(torch_keys.to_torch, **options),
            torch_keys.UNUSED.get((group, cfg.variant), ()),
            {"num_classes": (head, 0), **({"feat_dim": (inputs[group], 1)} if group in inputs else {})},
        )
    return found


_METHODS: Mapping[str, Callable[[ConfigDict], dict[str, Adapter]]] = {"mkd": _mkd}
