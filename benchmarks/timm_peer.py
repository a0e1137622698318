"""timm as a peer: the same architectures in PyTorch, with random weights."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from histokd_jax.encoders.presets import Encoder
from histokd_jax.nn.encoders.specs import SWIGLU, ViTSpec

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_timm() -> tuple[Any, Any]:
    """The module timm and what must stay alive beside it.

    torchvision, which timm imports, declares operators whose compiled code is missing beside another build of PyTorch;
    with their schemas declared by hand it can be imported, and nothing here calls them.

    Raises:
      ImportError: torch, torchvision or timm is not installed.
    """
    torch = importlib.import_module("torch")
    try:
        return importlib.import_module("timm"), None
    except (RuntimeError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] in ("timm", "torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        return importlib.import_module("timm"), library


def vit_options(timm: Any, spec: ViTSpec) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer for a specification."""
    import torch

    options = {"patch_size": spec.patch, "embed_dim": spec.width, "depth": spec.depth, "num_heads": spec.heads}
    options |= {"img_size": spec.image, "mlp_ratio": spec.hidden / spec.width + 1e-6, "reg_tokens": spec.registers}
    options |= {"init_values": 1e-5 if spec.layer_scale else None, "no_embed_class": not spec.embed_prefix}
    options |= {"qkv_bias": spec.qkv_bias, "class_token": spec.class_token, "num_classes": 0}
    options["global_pool"] = {"cls": "token", "mean": "avg", "cls_mean": ""}[spec.pool]
    if spec.mlp == SWIGLU:
        options |= {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}
    return options


def embed_function(encoder: Encoder, dtype: str, device: Any) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [B, size, size, 3] on the host -> float32 [B, ...] on the host, by timm in eager mode.

    Args:
      encoder: a vision transformer.
      dtype: "float32", or "bfloat16" by autocast, as users do.
      device: of PyTorch.
    """
    import torch

    timm, library = import_timm()
    model = timm.models.vision_transformer.VisionTransformer(**vit_options(timm, encoder.spec)).eval().to(device)
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (encoder.transform.mean, encoder.transform.std))

    @torch.inference_mode()
    def embed(tiles: np.ndarray, _keep: Any = library) -> np.ndarray:
        x = torch.from_numpy(tiles).to(device).permute(0, 3, 1, 2).float()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"):
            out = model((x / encoder.transform.scale - mean) / std)
        out = out if out.ndim == 2 else torch.cat([out[:, 0], out[:, encoder.spec.prefix :].mean(1)], -1)
        return out.float().cpu().numpy()

    return embed
