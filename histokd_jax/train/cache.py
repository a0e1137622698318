"""The persistent compilation cache, so that a second start does not compile again."""

from __future__ import annotations

import os
import pathlib

import jax


def enable(directory: pathlib.Path | None = None) -> pathlib.Path:
    """Turns the cache on; called by commands, never on import.

    Args:
      directory: where it lies; default: JAX_COMPILATION_CACHE_DIR, else the user's cache folder. The folder is trusted
        code: it must be writable by the user only.

    Returns:
      The folder.
    """
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR") or pathlib.Path(base) / "histokd_jax"
    chosen = pathlib.Path(directory or default)
    chosen.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    # Small models compile in less than the default threshold of one second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return chosen
