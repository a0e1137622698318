"""timm for tests; a test that needs it skips with the reason where it is not installed."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import timm_peer  # noqa: E402

KEPT = []
"""What must stay alive beside timm."""


def import_timm():
    """The module timm."""
    pytest.importorskip("torch")
    try:
        timm, kept = timm_peer.import_timm()
    except ImportError as error:
        pytest.skip(f"{error}: make test-torch installs it")
    KEPT.append(kept)
    return timm


def vit_options(spec):
    """Arguments of timm's VisionTransformer."""
    return timm_peer.vit_options(import_timm(), spec)
