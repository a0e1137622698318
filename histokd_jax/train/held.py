"""Networks that an earlier stage of a run has trained: kept beside the state of a later stage, not in it.

Only for the groups that a method names in `FROZEN`, which its `forward` also takes from `frozen`. They are written
once, when the later stage starts, so that no checkpoint of it holds them.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from histokd_jax.methods import registry
from histokd_jax.train.checkpoint import export_groups, load_groups
from histokd_jax.types import Stage

FOLDER = "held"
_EXTRA = "extra_"


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Networks that a stage uses and does not train.

    Attributes:
      params: group -> parameters.
      extra: group -> state without gradient, of the same groups.
    """

    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def frozen(self) -> dict[str, Any]:
        """As `Method.forward` takes them."""
        return {group: {"params": tree, "batch_stats": self.extra[group]} for group, tree in self.params.items()}

    def beside(self, params: Any, extra: Any) -> tuple[Any, Any]:
        """(parameters, extra state) of all networks, given those of the stage."""
        return ({**params, **self.params}, {**extra, **self.extra}) if self.params else (params, extra)


def groups(cfg: ConfigDict, stage: Stage, params: Mapping[str, Any]) -> tuple[str, ...]:
    """The groups that a stage holds."""
    declared = getattr(registry.method_module(cfg.method), "FROZEN", {})
    return tuple(group for group in params if group in declared and group not in stage.trainable)


def divide(cfg: ConfigDict, stage: Stage, params: Any, extra: Any) -> tuple[Any, Any, Held]:
    """(parameters and extra state of the stage, what it holds)."""
    names = groups(cfg, stage, params)
    if not names:
        return params, extra, Held()
    held = Held({name: params[name] for name in names}, {name: extra[name] for name in names})
    return *({name: tree for name, tree in trees.items() if name not in names} for trees in (params, extra)), held


def write(directory: pathlib.Path, held: Held) -> None:
    """Writes held networks to the folder of a fold."""
    if held.params:
        states = {_EXTRA + group: tree for group, tree in held.extra.items()}
        export_groups(directory / FOLDER, {**held.params, **states})


def read(directory: pathlib.Path, names: tuple[str, ...], params: Any, extra: Any) -> tuple[Any, Any]:
    """Replaces initial networks by those that `write` left.

    Args:
      directory: folder of the fold.
      names: groups that the stage holds.
      params: of all networks.
      extra: of all networks.

    Returns:
      (parameters, extra state).

    Raises:
      CheckpointMismatchError: if they are absent or have other shapes.
    """
    if not names:
        return params, extra
    like = {**params, **{_EXTRA + group: extra[group] for group in names}}
    found = load_groups(directory / FOLDER, like, (*names, *(_EXTRA + group for group in names)))
    own, states = ({group: found[prefix + group] for group in names} for prefix in ("", _EXTRA))
    return {**params, **own}, {**extra, **states}
