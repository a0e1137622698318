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

from ml_collections import ConfigDict


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
    value = _convert(key, text, flat[key])
    try:
        cfg.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as e:
        raise ConfigError(f"--config.{key}={text}: {e}") from e


def _convert(key: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None", "null": "None"}.get(text, text))
    except (ValueError, SyntaxError):
        if isinstance(default, tuple):  # teachers=M,G
            value = tuple(filter(None, text.strip("[]()").split(",")))
        else:
            raise ConfigError(f"--config.{key}={text}: expected {type(default).__name__}, like {default!r}") from None
    if isinstance(default, tuple):
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if isinstance(default, bool) != isinstance(value, bool) and default is not None and value is not None:
        raise ConfigError(f"--config.{key}={text}: expected {type(default).__name__}, like {default!r}")
    return float(value) if isinstance(default, float) and isinstance(value, int) else value


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


def fingerprint(cfg: ConfigDict) -> str:
    """sha256 of the resolved configuration."""
    return hashlib.sha256(to_json(cfg).encode()).hexdigest()


def _find(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.is_file():
        return path
    # An installed wheel carries the named configurations as package data.
    shipped = []
    for root in (pathlib.Path(__file__).parents[1] / "configs", pathlib.Path(__file__).parents[2] / "configs"):
        parts = path.parts[1:] if path.parts and path.parts[0] == "configs" else path.parts
        candidate = root.joinpath(*parts)
        if candidate.is_file():
            return candidate
        shipped += sorted(p.name for p in root.glob("*.py") if not p.name.startswith("_"))
    raise ConfigError(f"config file {name!r} not found; shipped with the package: {', '.join(shipped)}")


def _import(path: pathlib.Path) -> types.ModuleType:
    """Imports a config file as a member of a package, so that `from . import common` works wherever it lies."""
    folder = path.resolve().parent
    package = "_histokd_configs_" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    if package not in sys.modules:
        parent = types.ModuleType(package)
        parent.__path__ = [str(folder)]
        sys.modules[package] = parent
    module = importlib.import_module(f"{package}.{path.stem}")
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path.name} has no function get_config(arg)")
    return module
