"""How errors reach the user."""

from __future__ import annotations


def explain(error: BaseException, command: str) -> tuple[int, str]:
    """Exit code and one clear line for an expected error; an empty line for any other.

    Args:
      error: what ended the command.
      command: its name.
    """
    # Imported here so that --help needs no JAX.
    from histokd_jax.train.loop import DivergedError
    from histokd_jax.train.signals import Interrupted

    if isinstance(error, Interrupted):
        return 130, f"histokd: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"histokd {command}: interrupted; whatever was finished is kept, the same command continues"
    if isinstance(error, (ValueError, OSError, DivergedError)):
        return 1, f"histokd {command}: {error}"
    return 1, ""
