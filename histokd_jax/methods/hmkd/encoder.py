"""A pretrained patch encoder in the place of the random stem: from settings to architecture and weights."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from histokd_jax.encoders import loading, presets
from histokd_jax.encoders.presets import Encoder
from histokd_jax.methods.hmkd.images import MEAN, STD
from histokd_jax.nn.paired.encoded import ENCODER, PARTNER_ENCODER, StemEncoder

DEFAULTS: Mapping[str, Any] = dict(name="", spec="", weights="", frozen=True)
"""Settings `model.encoder`; without a name there is no encoder."""
PARTS = (ENCODER, PARTNER_ENCODER)


def settings(config: ml_collections.ConfigDict) -> Mapping[str, Any]:
    """`model.encoder`; models that were written before it existed have none."""
    return config.model.get("encoder", ml_collections.ConfigDict(DEFAULTS))


def is_used(config: ml_collections.ConfigDict) -> bool:
    """Whether an encoder stands in the place of the stem."""
    return bool(settings(config)["name"])


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuses settings that name no encoder or contradict each other.

    Raises:
      ValueError: naming the key and what is expected.
    """
    own = settings(config)
    if not own["name"]:
        given = [f"model.encoder.{key}" for key in ("spec", "weights") if own[key]]
        if given:
            raise ValueError(f"{' and '.join(given)} without model.encoder.name: name the encoder they belong to")
        return
    if not own["weights"]:
        raise ValueError(
            f"model.encoder.name = {own['name']!r} needs model.encoder.weights: a local file of its weights, or the "
            "folder of an encoder of this library. Nothing is downloaded"
        )
    stem_of(config)


def encoder_of(config: ml_collections.ConfigDict) -> Encoder:
    """The encoder that the settings describe, without its weights.

    Raises:
      ValueError: an unknown name, or changes that fit no network.
    """
    own = settings(config)
    try:
        return presets.changed(presets.get(own["name"]), own["spec"].split())
    except ValueError as error:
        raise ValueError(f"model.encoder: {error}") from error


def stem_of(config: ml_collections.ConfigDict) -> StemEncoder | None:
    """The stem of the networks, or None for a random one."""
    if not is_used(config):
        return None
    encoder = encoder_of(config)
    transform = encoder.transform
    # Networks see (v / 255 - MEAN) / STD, the encoder was trained on (v / scale - mean) / std.
    ratio = 255.0 / transform.scale
    multiplier = tuple(ours * ratio / theirs for ours, theirs in zip(STD, transform.std))
    shift = tuple((m * ratio - mean) / std for m, mean, std in zip(MEAN, transform.mean, transform.std))
    return StemEncoder(encoder.spec, multiplier, shift, settings(config)["frozen"])


def read_weights(config: ml_collections.ConfigDict) -> Mapping[str, Any]:
    """The variables of the encoder: "params", and "batch_stats" if it has any.

    Raises:
      ValueError: no such file, weights of another encoder, or an encoder folder of another architecture.
    """
    path, encoder = pathlib.Path(settings(config)["weights"]), encoder_of(config)
    if not path.exists():
        raise ValueError(f"model.encoder.weights = {str(path)!r} does not exist: give a local file or encoder folder")
    if not path.is_dir():
        return loading.load(encoder, path).variables
    found = loading.load_folder(path)
    theirs, ours = found.encoder.transform, encoder.transform
    same_input = (theirs.mean, theirs.std, theirs.scale) == (ours.mean, ours.std, ours.scale)
    if found.encoder.spec != encoder.spec or not same_input:
        raise ValueError(
            f"model.encoder.weights = {str(path)!r} holds {found.encoder.spec} with {theirs}, but model.encoder.name "
            f"and model.encoder.spec give {encoder.spec} with {ours}: set them alike"
        )
    return found.variables


def with_weights(variables: Mapping[str, Any], params: Any, extra: Any) -> tuple[Any, Any]:
    """Replaces the encoders of all networks by a pretrained one.

    Args:
      variables: of the encoder.
      params: network -> parameters.
      extra: network -> running statistics.

    Returns:
      (params, extra).
    """

    def replaced(trees: Any, collection: str) -> Any:
        def copy() -> Any:
            return jax.tree.map(jnp.array, variables[collection])

        return {
            name: {part: copy() if part in PARTS else leaves for part, leaves in tree.items()}
            for name, tree in trees.items()
        }

    return replaced(params, "params"), replaced(extra, "batch_stats")
