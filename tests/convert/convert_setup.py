"""Full configurations of methods, as a named configuration file would give them."""

import importlib

from ml_collections import ConfigDict

from histokd_jax.methods import registry

common = importlib.import_module("configs.common")


def full_config(method, **changes):
    """Shared settings under those of the method; `changes` are dotted keys with `__` for the dot."""
    own = registry.method_module(method).default_config().to_dict(preserve_field_references=True)
    cfg = common.base()
    cfg.method = method
    for section, values in own.items():
        if isinstance(values, dict) and section in cfg:
            for key, value in values.items():
                cfg[section][key] = value
        else:
            cfg[section] = ConfigDict(values) if isinstance(values, dict) else values
    cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return cfg
