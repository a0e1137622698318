"""timm beside a CPU build of PyTorch."""

import sys

import pytest

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
KEPT = []
"""Libraries of operators live as long as something refers to them."""


def import_timm():
    """The module timm; torchvision's compiled operators, which it does not need here, may be missing."""
    torch = pytest.importorskip("torch")
    for name in ("torchvision", "timm"):
        if name not in sys.modules:
            import importlib.util

            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed: make test-torch installs it")
    try:
        import timm
    except (RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        KEPT.append(library)
        import timm
    return timm
