"""The architecture of CoCoFNet and its student as plain values (specification, section 12)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from histokd_jax.ops.token_attention import GATED

BLOCK_INPUT, ATTENTION_OUTPUT = "block_input", "attn_output"
FFN_SOURCES = (BLOCK_INPUT, ATTENTION_OUTPUT)
LEVELS = 3
"""Levels with a cross block; one joint level follows."""


@dataclasses.dataclass(frozen=True)
class NormSpec:
    """Batch and group norms.

    Attributes:
      eps: added to the variance of a batch norm.
      update: weight of the new value in the running statistics.
      unbiased: whether the running variance takes the factor n / (n - 1), as the reference does (section 13).
      group_eps: of the group norm.
    """

    eps: float = 1e-5
    update: float = 0.1
    unbiased: bool = True
    group_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class PairedSpec:
    """Teacher and student; names and defaults as in the reference configuration of the specification.

    Attributes:
      widths: channels of the four levels.
      stem_patch: side of the first patch; the later ones have side 2.
      stem_inputs: channels that the first patch reads: 3 of an image, or those of an encoder's tokens.
      teacher_depths: blocks per level, in each stream of the first three.
      student_depths: the same of the student.
      mlp_ratio: hidden width of every MLP over its width.
      attn_expand: expanded attention maps E.
      local_reduction: width of a local unit over its hidden width.
      local_kernels: sides of the multi-scale depth-wise unit; the first takes the remainder of the channels.
      refine_reduction: width over inner width of the refine unit.
      refine_min: its least inner width.
      head_hidden: width of the layer before the logits.
      num_classes: C.
      gate: "score_times_softmax", or "softmax" (D14).
      cross_ffn_source: what the student's FFN reads: "block_input" as released, or "attn_output" (D2).
      norm: batch and group norms.
      dtype: compute dtype of convolutions and products; None for that of the parameters. Scores, softmax, maps, norms
        and everything behind the last level stay at least float32.
      plane_elements: numbers of one block of an attention plane; a larger plane is computed in blocks of rows.
      depthwise_form: see `histokd_jax.ops.depthwise`.
      folded: whether equal parts (both streams of the teacher, the blocks of a level) are loops over their parameters,
        so that each is compiled once; parameters and results are the same. See `histokd_jax.nn.paired.folded`.
    """

    widths: tuple[int, ...] = (48, 96, 224, 448)
    stem_patch: int = 32
    stem_inputs: int = 3
    teacher_depths: tuple[int, ...] = (2, 2, 6, 2)
    student_depths: tuple[int, ...] = (2, 2, 2, 2)
    mlp_ratio: int = 4
    attn_expand: int = 4
    local_reduction: int = 4
    local_kernels: tuple[int, ...] = (1, 3, 5, 7)
    refine_reduction: int = 8
    refine_min: int = 16
    head_hidden: int = 128
    num_classes: int = 4
    gate: str = GATED
    cross_ffn_source: str = BLOCK_INPUT
    norm: NormSpec = NormSpec()
    dtype: jnp.dtype | None = None
    plane_elements: int = 2**22
    depthwise_form: str = "shifts"
    folded: bool = True

    def refine_width(self, channels: int) -> int:
        """Inner width of the refine unit (section 4.4)."""
        return max(self.refine_min, channels // self.refine_reduction)

    def scale_sizes(self, channels: int) -> tuple[int, ...]:
        """Channels of the multi-scale groups of a hidden width (section 4.2), in the order of `local_kernels`."""
        share = channels // len(self.local_kernels)
        return (channels - share * (len(self.local_kernels) - 1), *(share,) * (len(self.local_kernels) - 1))

    def check_size(self, height: int, width: int) -> None:
        """Refuses an image of which a level would have no token.

        Raises:
          ValueError: naming the size and the least one.
        """
        least = self.stem_patch * 2 ** (len(self.widths) - 1)
        if min(height, width) < least:
            raise ValueError(
                f"images of {height} x {width} pixels are too small: with model.stem_patch = {self.stem_patch} both "
                f"sides must be at least {least}; resize them, or lower model.stem_patch"
            )
