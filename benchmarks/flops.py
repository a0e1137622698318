"""Analytic arithmetic and memory traffic of one training step of the student S_P and of MKD, per valid patch.

Only matrix products count (2 FLOPs per multiply-add); padding, recomputation and the optimizer do not, so that a rate
made from these numbers cannot be raised by wasted work. XLA's own count is no substitute: it counts a loop body once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

STUDENT, MKD = "student", "mkd"
METHODS = (STUDENT, MKD)
# Backward pass: two products of the size of the forward one; one where the input needs no gradient.
INNER, FIRST = 3, 2
FUSION_INNER = 32
"""Width of each factor of the bilinear fusion (`histokd_jax.nn.fusion.BilinearFusion`)."""
PARAMETER_BYTES = 24
"""Least traffic per float32 parameter of an AdamW step: value and two moments, each read once and written once."""


@dataclasses.dataclass(frozen=True)
class Widths:
    """Sizes that fix the arithmetic.

    Attributes:
      feat_dim: patch-embedding width D.
      width: embedding width H.
      hidden: attention width A.
      classes: C.
      genes: K, a multiple of `token_size`.
      token_size: genes per token.
    """

    feat_dim: int = 1024
    width: int = 256
    hidden: int = 128
    classes: int = 2
    genes: int = 8192
    token_size: int = 512

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Widths:
        """The widths of a benchmark configuration (`feat_dim`, `model_d`, `model_attn`, `genes`, `token_size`)."""
        return cls(
            config["feat_dim"], config["model_d"], config["model_attn"], 2, config["genes"], config["token_size"]
        )


def _attention(w: Widths) -> int:
    """Forward FLOPs of gated attention per token: two gates, the score, the weighted sum."""
    return 4 * w.width * w.hidden + 2 * w.hidden + 2 * w.width


def patch_flops(w: Widths, method: str) -> int:
    """FLOPs of one training step per valid patch.

    Args:
      w: widths.
      method: "student" (S_P) or "mkd" (S_P and T_M read patches).

    Raises:
      ValueError: unknown method.
    """
    per_network = FIRST * 2 * w.feat_dim * w.width + INNER * _attention(w)
    return per_network * {STUDENT: 1, MKD: 2}[_known(method)]


def slide_flops(w: Widths, method: str) -> int:
    """FLOPs of one training step per slide: classifier heads, gene encoders, fusion.

    Args:
      w: widths.
      method: "student" or "mkd".

    Raises:
      ValueError: unknown method.
    """
    head = INNER * 2 * w.width * w.classes
    if _known(method) == STUDENT:
        return head
    tokens = w.genes // w.token_size
    genes = FIRST * 2 * w.genes * w.width + INNER * tokens * _attention(w)
    return 3 * head + 2 * genes + INNER * _fusion(w)


def _fusion(w: Widths) -> int:
    inner, h = FUSION_INNER, w.width
    bilinear = 2 * inner * h * h + 2 * inner * h
    factors = 2 * (2 * h * inner + bilinear + 2 * inner * inner)
    return factors + 2 * (inner + 1) ** 2 * h + 2 * 3 * h * h


def step_flops(w: Widths, method: str, patches: float, slides: float) -> float:
    """FLOPs of one training step.

    Args:
      w: widths.
      method: "student" or "mkd".
      patches: valid patches of the step.
      slides: slides of the step.
    """
    return patches * patch_flops(w, method) + slides * slide_flops(w, method)


def parameters(w: Widths, method: str) -> int:
    """Number of trained parameters.

    Args:
      w: widths.
      method: "student" or "mkd".

    Raises:
      ValueError: unknown method.
    """
    attention = 2 * _affine(w.width, w.hidden) + _affine(w.hidden, 1)
    bag, head = _affine(w.feat_dim, w.width) + attention, _affine(w.width, w.classes)
    if _known(method) == STUDENT:
        return bag + head
    inner, genes = FUSION_INNER, _affine(w.token_size, w.width) + attention
    factor = _affine(w.width, inner) + inner * w.width**2 + inner + _affine(inner, inner)
    fusion = 2 * factor + _affine((inner + 1) ** 2, w.width) + _affine(3 * w.width, w.width)
    return 2 * bag + 3 * head + 2 * genes + fusion


def _affine(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def step_bytes(w: Widths, method: str, patches: float, slides: float, patch_itemsize: int) -> float:
    """Least bytes that a training step moves to and from device memory.

    Patches are read once forward and once backward, all networks sharing the read; activations never leave the chip;
    parameters and optimizer moments are read and written once.

    Args:
      w: widths.
      method: "student" or "mkd".
      patches: valid patches of the step.
      slides: slides of the step.
      patch_itemsize: bytes of one number of a patch embedding.
    """
    genes = slides * w.genes * 4 * 2 if _known(method) == MKD else 0
    return patches * w.feat_dim * patch_itemsize * 2 + genes + parameters(w, method) * PARAMETER_BYTES


def _known(method: str) -> str:
    if method not in METHODS:
        raise ValueError(f"method {method!r} has no analytic count; use one of {METHODS}")
    return method
