"""Loading configurations: `file.py[:args]` plus dotted overrides, typed by the defaults they replace."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import json
import pathlib
import sys
import types
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict, FieldReference

SHIPPED = (pathlib.Path(__file__).parents[1] / "configs", pathlib.Path(__file__).parents[2] / "configs")
"""Where the named configurations lie: package data of an installed wheel, or the source tree."""

_LITERALS = {"true": "True", "false": "False", "none": "None", "null": "None"}


class ConfigError(ValueError):
    """A configuration that cannot be used; the text says what to change."""


def load(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Builds the resolved configuration of a run.

    Args:
      spec: "path/to/file.py" or "path/to/file.py:args". "configs/NAME.py" also resolves from the installed package.
      overrides: "dotted.key=value" strings, applied in order.

    Returns:
      A locked ConfigDict.

    Raises:
      ConfigError: for a missing file, a bad argument, an unknown key or a value of the wrong type.
    """
    name, _, arg = spec.partition(":")
    module = _import(_find(name))
    try:
        cfg = module.get_config(arg)
    except ValueError as e:
        raise ConfigError(f"--config {spec}: {e}") from e
    cfg.lock()
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq:
            raise ConfigError(f"override {text!r} has no value: write --config.{key}=VALUE")
        set_key(cfg, key, value)
    return cfg


def load_sweep(spec: str, overrides: Iterable[str] = (), only: Iterable[str] = ()) -> tuple[dict[str, ConfigDict], str]:
    """Builds the configurations that a sweep compares.

    Args:
      spec: a file with `REFERENCE` and `get_sweep(arg) -> (base, {setting: {dotted key: value}})`, as for `load`.
      overrides: "dotted.key=value" strings, applied to every setting before its own changes.
      only: settings to keep; the reference is always kept. Empty for all.

    Returns:
      (setting -> locked ConfigDict, the reference first; name of the reference).

    Raises:
      ConfigError: as `load`; an unknown setting; two settings with the same values.
    """
    name, _, arg = spec.partition(":")
    module = _import(_find(name), "get_sweep")
    try:
        base, settings = module.get_sweep(arg)
    except ValueError as e:
        raise ConfigError(f"--config {spec}: {e}") from e
    unknown = sorted(set(only) - set(settings))
    if unknown:
        raise ConfigError(f"{name} has no setting {', '.join(unknown)}; it has {', '.join(settings)}")
    reference, kept, texts = module.REFERENCE, {}, {}
    for setting in dict.fromkeys([reference, *(only or settings)]):
        cfg = _changed(load(base, overrides), setting, settings[setting])
        twin = texts.setdefault(to_json(cfg), setting)
        if twin != setting:
            raise ConfigError(
                f"settings {twin} and {setting} of {name} have the same values with these overrides: leave one out "
                "with --only"
            )
        kept[setting] = cfg
    return kept, reference


def _changed(cfg: ConfigDict, setting: str, changes: dict[str, Any]) -> ConfigDict:
    flat = flatten(cfg)
    for key, value in changes.items():
        if key not in flat:
            near = difflib.get_close_matches(key, flat, n=3, cutoff=0.5)
            raise ConfigError(f"setting {setting}: unknown config key {key!r}; did you mean {', '.join(near)}?")
        try:
            cfg.update_from_flattened_dict({key: value})
        except (TypeError, ValueError) as e:
            raise ConfigError(f"setting {setting}: {key}={value!r}: {e}") from e
    return cfg


def set_key(cfg: ConfigDict, key: str, text: str) -> None:
    """Sets one dotted key from text, converted to the type of its default.

    Raises:
      ConfigError: unknown key (with the nearest names) or a value of another type.
    """
    flat = flatten(cfg)
    if key not in flat:
        near = difflib.get_close_matches(key, flat, n=3, cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; keys are: {', '.join(sorted(flat))}"
        raise ConfigError(f"unknown config key {key!r}{hint}")
    value = _convert(key, text, flat[key], *_kind(cfg, key))
    try:
        cfg.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as e:
        raise ConfigError(f"--config.{key}={text}: {e}") from e


def _kind(cfg: ConfigDict, key: str) -> tuple[type, bool]:
    """Type of a key, and whether it may be None; such keys hold typed references."""
    node = cfg.to_dict(preserve_field_references=True)
    for part in key.split("."):
        node = node[part]
    return (node.get_type(), True) if isinstance(node, FieldReference) else (type(node), False)


def _convert(key: str, text: str, default: Any, kind: type, nullable: bool) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval(_LITERALS.get(text.lower(), text))
    except (ValueError, SyntaxError):
        # A name is no literal, but may stand in a list: teachers=M,G
        value = tuple(filter(None, text.strip("[]()").split(","))) if kind is tuple else text
    if kind is tuple:
        return tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if value is None and nullable:
        return None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        allowed = f"{kind.__name__} or None" if nullable else kind.__name__
        raise ConfigError(f"--config.{key}={text}: expected {allowed}, like {default!r}")
    return value


def flatten(cfg: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every leaf."""
    out = {}
    for key, value in cfg.items():
        if isinstance(value, ConfigDict):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def to_json(cfg: ConfigDict) -> str:
    """The resolved configuration as sorted, indented JSON."""
    return json.dumps(cfg.to_dict(), indent=2, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """Inverse of `to_json` (lists become tuples, as in the named configurations)."""

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text))).lock()


EXECUTION = ("mesh.", "data.threads", "data.buffer_mib", "data.resident")
"""Beginnings of the keys that say where a run computes and where its batches come from, not what it computes; they may
change when a run is continued. What they may change of its numbers (int8 patches) is part of `Feeder.identity`."""


def identity(cfg: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value of every setting that decides what a run computes."""
    return {key: value for key, value in flatten(cfg).items() if not key.startswith(EXECUTION)}


def fingerprint(cfg: ConfigDict) -> str:
    """sha256 of `identity`."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()


def _find(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.is_file():
        return path
    shipped = []
    for root in SHIPPED:
        parts = path.parts[1:] if path.parts and path.parts[0] == "configs" else path.parts
        candidate = root.joinpath(*parts)
        if candidate.is_file():
            return candidate
        shipped += sorted(p.name for p in root.glob("*.py") if not p.name.startswith("_"))
    raise ConfigError(f"config file {name!r} not found; shipped with the package: {', '.join(shipped)}")


def _import(path: pathlib.Path, needed: str = "get_config") -> types.ModuleType:
    """Imports a config file as a member of a package, so that `from . import common` works wherever it lies."""
    folder = path.resolve().parent
    package = "_histokd_configs_" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if package not in sys.modules:
        parent = types.ModuleType(package)
        # A file copied elsewhere still finds the shared settings.
        parent.__path__ = [str(root) for root in (folder, *SHIPPED)]
        sys.modules[package] = parent
    module = importlib.import_module(f"{package}.{path.stem}")
    if not hasattr(module, needed):
        kind = (
            "one configuration" if hasattr(module, "get_config") else "a sweep" if hasattr(module, "get_sweep") else ""
        )
        hint = f"; it holds {kind}" if kind else ""
        raise ConfigError(f"{path} has no function {needed}(arg){hint}")
    return module
