"""The contracts that every module shares: batch fields, the Method interface, metric pairs. Imports JAX only.

Axis letters used everywhere: R rows, L patches per row, D patch-embedding width, S slots of a step (one slide each),
H hidden width, A attention width, C classes, Q attention queries per slide, K genes, b slides of a batch-coupled step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Batch = Mapping[str, jax.Array]
"""One step. Fields (dtypes on the host; see `data_pipelines.schema` for the authoritative list):

patches      [R, L, D] float16/float32  rows of patch embeddings; padding rows may hold anything, even NaN
segment_ids  [R, L]    int32            0 = padding, 1..S = slot of the slide within the *step* (a slide may span rows)
positions    [R, L]    int32            index of the patch within its bag, 0-based; seeds per-patch dropout
neighbours   [R, L, k] int32            places from a patch to each of its nearest neighbours on the slide, in the
                                        stream of all patches of the step; 0 = none (only if the method asks for them)
weight       [S]       float32          1 for a real slide, 0 for an empty slot
slide_index  [S]       int32            row of the slide in the manifest (number of the sample if a sample is all slides
                                        of its case), -1 for an empty slot
label        [S]       int32            class index (0 in empty slots); of a survival task: time bin
time_months  [S]       float32          follow-up (survival tasks only; 0 in empty slots)
event        [S]       float32          1 = death observed, 0 = censored (survival tasks only)
genes        [S, K]    float32          selected genes in rank order (only if the method asks for them)
has_genes    [S]       bool             False where a slide has no genes
teacher_hazards [S, C] float32          hazards that a finished run predicted (only if the method asks for them)
has_teacher  [S]       bool             False where it predicted none

A step of image pairs (paired stains, self-supervision) holds B examples instead of bags:

image        [B, H, W, 3] uint8         the modality of deployment: an H&E tile
partner      [B, H, W, 3] uint8         what is only known in training (an IHC or IF image, a mask), or [B, P] float32
                                        (a vector, e.g. expression); zeros where there is none
has_partner  [B]       bool             False where an example has no partner
label        [B]       int32            class index (0 where there is none)
has_label    [B]       bool             False where an example has no label
example      [B]       int32            number of the example in the data set; with the step it seeds augmentation, so
                                        that an example is augmented alike on any number of devices
weight       [B]       float32          1 for a real example, 0 for one that only fills the last step
slide_index  [B]       int32            as `example`, -1 for a filler
"""

Params = Any
Extra = Any
Outputs = Mapping[str, jax.Array]
Metrics = Mapping[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, count). Means are taken once, on the host, after summing over steps."""


CLASSIFICATION, SURVIVAL, REPRESENTATION = "classification", "survival", "representation"


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a method must know about the data to build its networks.

    Attributes:
      feat_dim: patch-embedding width D.
      num_classes: outputs C: classes, or time bins of a survival task.
      num_genes: width K of the batch field `genes`.
      task: "classification", "survival", or "representation": no labels.
      gene_groups: sizes of consecutive blocks of `genes`, one per functional group; empty: no groups.
      image_size: (height, width) of the images of a step of pairs; None: the data are bags.
      vector_size: width P of the field `partner` if it is a vector; 0: it is an image, or absent.
    """

    feat_dim: int
    num_classes: int
    num_genes: int = 0
    task: str = CLASSIFICATION
    gene_groups: tuple[int, ...] = ()
    image_size: tuple[int, int] | None = None
    vector_size: int = 0


@dataclasses.dataclass(frozen=True)
class ImageEncoder:
    """An image encoder among the networks of a method, as others may use it.

    Attributes:
      name: how it is called in manifests.
      spec: architecture, see `histokd_jax.nn.encoders.specs`.
      size: edge of its images in pixels.
      mean: per channel, subtracted from pixels divided by `scale`.
      std: per channel, divides them then.
      scale: divisor of pixels 0..255.
      start: encoder folder with its initial weights; empty: random.
      export: folder, within that of a fold, to which it is written after training; empty: it is not.
    """

    name: str
    spec: Any
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float
    start: str = ""
    export: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One phase of training.

    Attributes:
      name: handed to `Method.objective`.
      trainable: top-level parameter groups that are updated; others are left bit-identical.
      monitor_modes: inference modes over which the stopping monitor of this stage is the mean (validation AUC, or
        C-index of a survival task).
      frozen: parts of the trained groups (names one level below) that are left bit-identical as well.
      undecayed: trainable groups without weight decay.
    """

    name: str
    trainable: tuple[str, ...]
    monitor_modes: tuple[str, ...]
    frozen: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    undecayed: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to deploy a trained method.

    Attributes:
      name: e.g. "pathology".
      params: top-level parameter groups it needs; all others may be absent.
      fields: batch fields it needs; all others may be absent.
    """

    name: str
    params: tuple[str, ...]
    fields: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Method:
    """A learning system as pure functions; the train loop knows nothing else about it.

    Attributes:
      name: registry name.
      init: (key) -> (params, extra). `params` is a dict of top-level groups (one per network).
      forward: (params, frozen, extra, batch, key, train, stage=) -> (outputs, new_extra). `outputs` holds slot-major
        arrays [S, ...] only, so that a step can be cut between forward and objective (gradient caching).
      objective: (outputs, batch, step, stage, values=None) -> (scalar loss, metrics). Batch-coupled terms see all S
        slots. `values` (config key of `traced` -> scalar array) replaces constants of the configuration by data; every
        term is then computed, whatever its weight. Only methods with `traced` keys need to accept it.
      predict: (params, frozen, extra, batch, mode, key=None) -> {"prob": [S, C], "logits": [S, C],
        "embedding": [S, H]}; a key turns on dropout in the teachers. A survival task has "risk" [S] and "hazards"
        [S, C] (C = 0 for a Cox head) in place of "prob"; a representation task has "loss" [S], whose mean over the
        real samples of a step is the loss of the step, and "together" [S], how many they are.
      modes: the ways to deploy it.
      stages: phases of training, in order.
      requires: batch fields needed in training.
      batch_coupled: True if the loss couples slides, so that a step must hold exactly b of them.
      attention: (params, frozen, extra, batch, mode) -> [R, L] float32, weight of each patch within its slide.
      prepare: (params, extra, batches, seed) -> (params, extra), once before the first step: `batches()` iterates over
        every training sample once, in exact steps. None: training starts from `init`.
      after_update: (params) -> params, after every update; None: nothing.
      traced: config keys of numbers that `objective` also takes as data, so that settings which differ only in them
        can be trained by one program.
      load: (params, extra) -> (params, extra) with parts that were trained elsewhere in the place of initial ones;
        reads files, so it is called once, outside of any compiled program. None: everything starts as `init` says.
      least_slides: fewest slides of a step that the loss of a batch-coupled method is defined on.
    """

    name: str
    init: Callable[..., tuple[Params, Extra]]
    forward: Callable[..., tuple[Outputs, Extra]]
    objective: Callable[..., tuple[jax.Array, Metrics]]
    predict: Callable[..., Mapping[str, jax.Array]]
    modes: tuple[Mode, ...]
    stages: tuple[Stage, ...]
    requires: tuple[str, ...]
    batch_coupled: bool
    attention: Callable[..., jax.Array] | None = None
    prepare: Callable[..., tuple[Params, Extra]] | None = None
    after_update: Callable[[Params], Params] | None = None
    traced: tuple[str, ...] = ()
    load: Callable[[Params, Extra], tuple[Params, Extra]] | None = None
    least_slides: int = 2

    def mode(self, name: str) -> Mode:
        """The mode called `name`.

        Raises:
          ValueError: if this method has no such mode.
        """
        for mode in self.modes:
            if mode.name == name:
                return mode
        raise ValueError(f"method {self.name!r} has no mode {name!r}; it has {[m.name for m in self.modes]}")
