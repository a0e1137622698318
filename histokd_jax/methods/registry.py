"""Methods by name. Explicit, and imported on demand: a run loads the code of its own method only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from histokd_jax.types import Method

METHODS = {
    "mkd": "histokd_jax.methods.mkd.method",
    "supervised": "histokd_jax.methods.supervised.method",
    "ghanet": "histokd_jax.methods.ghanet.method",
    "survival_kd": "histokd_jax.methods.survival_kd.method",
    "distil": "histokd_jax.methods.distil.method",
    "image_classifier": "histokd_jax.methods.image_classifier.method",
    "hmkd": "histokd_jax.methods.hmkd.method",
    "momkd": "histokd_jax.methods.momkd.method",
    "ssl": "histokd_jax.methods.ssl.method",
}
"""Name -> module with `make_method(config, data) -> Method`, `default_config()` and `validate(config)`; optional are
`TASKS`, the kinds of task it knows (all, if absent), `CONTROL`, the settings (key -> value) of its control arm, and
`FROZEN`, parameter groups that may be read from a finished run (group -> configuration key of its folder), with
`UNFROZEN`, settings under which the run would train them itself, and `precompute(config, data, frozen, batches,
examples)`, which may replace them by their outputs; and `image_encoders(config, data)`, the image encoders among its
networks (group -> `histokd_jax.types.ImageEncoder`), which may start from encoder folders and are written to them."""


def method_module(name: str) -> ModuleType:
    """Imports the module of a method.

    Args:
      name: key of `METHODS`.

    Returns:
      The module.

    Raises:
      ValueError: if no method has this name.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; use one of {sorted(METHODS)}")
    return importlib.import_module(METHODS[name])


def get_method(name: str) -> Callable[..., Method]:
    """The factory `(config, data) -> Method` of a method.

    Args:
      name: key of `METHODS`.

    Returns:
      `make_method` of its module.

    Raises:
      ValueError: if no method has this name.
    """
    return method_module(name).make_method
