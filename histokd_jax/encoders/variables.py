"""Trees of an encoder's variables: flat names, and one number that identifies all values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Flat = Mapping[str, np.ndarray]
""""params/blocks/qkv/kernel" -> array."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one level, names joined by slashes, sorted."""
    flat = {}
    for name in sorted(tree):
        value, path = tree[name], f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = value
    return tree


def fingerprint(variables: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over names, shapes and float32 values: the same whatever file they came from."""
    digest = hashlib.sha256()
    for path, value in flatten(variables).items():
        array = np.ascontiguousarray(value, np.float32)
        digest.update(f"{path} {array.shape}\n".encode())
        digest.update(array)
    return digest.hexdigest()
