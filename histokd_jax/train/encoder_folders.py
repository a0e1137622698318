"""Image encoders inside a method: where they start from (an encoder folder), and the folders they are written to.

A method whose parameters hold image encoders says so by a function `image_encoders(config, data)` of its module, which
gives parameter group -> `histokd_jax.types.ImageEncoder`. `histokd embed --weights` reads what is written here.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from histokd_jax.encoders import folder
from histokd_jax.encoders.presets import Encoder, Transform
from histokd_jax.encoders.variables import fingerprint
from histokd_jax.methods import registry
from histokd_jax.types import DataSpec, ImageEncoder

STATS = "batch_stats"
# They say how a network is initialised and what it usually reads, not what it computes.
_FREE = ("kernel_init", "image")


@dataclasses.dataclass(frozen=True, eq=False)
class Starts:
    """Networks that do not start at random.

    Attributes:
      groups: parameter group -> {"params", "batch_stats" if it has running statistics}.
      identity: what must stay equal to continue a run.
    """

    groups: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)


def of_method(cfg: ConfigDict, spec: DataSpec) -> dict[str, ImageEncoder]:
    """Parameter group -> the image encoder it holds; empty for most methods."""
    own = getattr(registry.method_module(cfg.method), "image_encoders", None)
    return {} if own is None else dict(own(cfg, spec))


def read_starts(cfg: ConfigDict, spec: DataSpec) -> Starts:
    """Reads the folders that the encoders of a method start from.

    Raises:
      ValueError: another architecture or another scale of the pixels; names the difference.
      DataError: no encoder there.
    """
    groups, identity = {}, {}
    for group, own in of_method(cfg, spec).items():
        if not own.start:
            continue
        encoder, variables = folder.load(pathlib.Path(own.start))
        _check(encoder, own, group)
        groups[group] = variables
        identity[f"start of {group}"] = fingerprint(variables)
    return Starts(groups, identity)


def placed(starts: Starts, params: Mapping[str, Any], extra: Any) -> tuple[Any, Any]:
    """(parameters, extra state) with those that were read in the place of random ones."""
    own = {group: found["params"] for group, found in starts.groups.items()}
    stats = {group: found[STATS] for group, found in starts.groups.items() if STATS in found}
    return {**params, **own}, {**extra, **stats} if stats else extra


def write(
    directory: pathlib.Path, cfg: ConfigDict, spec: DataSpec, params: Any, extra: Any, manifest: Any, **facts: Any
) -> list[pathlib.Path]:
    """Writes the trained encoders of a method.

    Args:
      directory: folder of the fold; each encoder gets the folder that it names.
      cfg: the configuration.
      spec: of the data.
      params: all parameter groups, complete on this process.
      extra: running statistics by group.
      manifest: of the data set: resolution and name.
      **facts: JSON facts that are kept with each of them.

    Returns:
      The folders.
    """
    written = []
    for group, own in of_method(cfg, spec).items():
        if not own.export:
            continue
        variables = {"params": params[group], **({STATS: extra[group]} if group in extra else {})}
        mpp = () if manifest.mpp is None else (float(manifest.mpp),)
        licence = f"trained on {manifest.name}: the terms of these images decide"
        encoder = Encoder(own.name, own.spec, _transform(own), mpp, licence)
        facts = {**facts, "method": cfg.method, "simulated": manifest.simulated, "data": manifest.fingerprint()}
        folder.save(directory / own.export, encoder, jax.device_get(variables), **facts)
        written.append(directory / own.export)
    return written


def _transform(own: ImageEncoder) -> Transform:
    return Transform(own.size, own.size, mean=own.mean, std=own.std, scale=own.scale)


def _check(encoder: Encoder, own: ImageEncoder, group: str) -> None:
    there, here = (dataclasses.asdict(spec) for spec in (encoder.spec, own.spec))
    differ = [k for k in {**there, **here} if there.get(k) != here.get(k) and k not in _FREE]
    if differ or type(encoder.spec) is not type(own.spec):
        told = ", ".join(f"{k} = {there.get(k)!r} there, {here.get(k)!r} here" for k in sorted(differ))
        raise ValueError(f"{own.start} cannot be the start of {group}, another architecture: {told}")
    theirs, ours = ((t.mean, t.std, t.scale) for t in (encoder.transform, _transform(own)))
    if theirs != ours:
        raise ValueError(
            f"{own.start} was made for pixels with mean, deviation and scale {theirs}; {group} would get {ours}: set "
            "encoder.input"
        )
