"""The table of distillation losses: name -> function, what it reads, what it needs, and its customary weight."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from histokd_jax.losses import (
    boundaries,
    congruence,
    contrastive,
    factors,
    hints,
    joint_embedding,
    kernels,
    logits,
    memory,
    moments,
    peers,
    relational,
    similarity,
    survival_distillation,
)

LOGITS, VECTOR, MAP, MAP_PAIR = "logits", "vector", "map", "map_pair"
READS = (LOGITS, VECTOR, MAP, MAP_PAIR)
LABEL, RHO, MARGIN, HEAD_LOGITS, MEMORY = "label", "rho", "margin", "head_logits", "memory"
"""What a function needs beside student and teacher: integer labels; the variance parameters of VID; the channel margins
of OFD; both sides' logits behind the teacher's head (SRRL); a state that it hands on."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One loss of the catalogue.

    Attributes:
      function: `(student, teacher, [label | rho | margin | logits], *, where, **options)` -> [b] or []; with `MEMORY`
        `(state, student, teacher, ...) -> (values, new state)`.
      reads: one of `READS`: [b, C] logits, [b, d] vectors, [b, C, positions ...] maps, or pairs of consecutive maps.
      weight: the weight it is usually given, from the specification where that names one.
      per_example: whether values [b] come back.
      couples_batch: whether an example's value depends on the others; then only the global batch gives the loss.
      same_width: whether student and teacher need equal channels, so that a connector is needed where they differ.
      needs: further inputs.
      trains_teacher: whether the gradient reaches the teacher by design; else the caller stops it.
      ce: the weight of the cross entropy beside it: 0.1 with KD as published, 0 where the loss contains it.
      options: keyword arguments that a configuration may set -> default.
      layer_weights: number of layers -> weight of each; None: 1 each.
      ordered: whether the order of the batch matters.
    """

    function: Callable[..., Any]
    reads: str
    weight: float
    per_example: bool = True
    couples_batch: bool = False
    same_width: bool = True
    needs: tuple[str, ...] = ()
    trains_teacher: bool = False
    ce: float = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer_weights: Callable[[int], tuple[float, ...]] | None = None
    ordered: bool = False


def _coupled(function: Callable[..., jax.Array], reads: str, weight: float, **facts: Any) -> Entry:
    return Entry(function, reads, weight, **{"per_example": False, "couples_batch": True, **facts})


_VICREG = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0, "gamma": 1.0, "form": joint_embedding.AUTO}

CATALOGUE: Mapping[str, Entry] = MappingProxyType(
    {
        # Logits.
        "kd": Entry(logits.kd_loss, LOGITS, 0.9, ce=0.1, options={"temperature": 4.0}),
        "standardised_kd": Entry(logits.standardised_kd_loss, LOGITS, 0.9, ce=0.1, options={"temperature": 2.0}),
        "dkd": Entry(
            logits.dkd_loss, LOGITS, 1.0, needs=(LABEL,), options={"alpha": 1.0, "beta": 8.0, "temperature": 4.0}
        ),
        "dist": _coupled(logits.dist_loss, LOGITS, 2.0, options={"beta": 1.0, "gamma": 1.0, "temperature": 1.0}),
        "generalised": Entry(
            logits.generalised_distillation_loss,
            LOGITS,
            1.0,
            needs=(LABEL,),
            ce=0.0,
            options={"imitation": 0.5, "temperature": 2.0},
        ),
        "dml": Entry(peers.mutual_loss, LOGITS, 1.0, trains_teacher=True, options={"temperature": 1.0}),
        "kdcl": Entry(
            peers.kdcl_pair_loss,
            LOGITS,
            1.0,
            needs=(LABEL,),
            trains_teacher=True,
            options={"temperature": 2.0, "kind": peers.MIN_LOGIT},
        ),
        # Hazard logits of survival networks.
        "hazard": Entry(survival_distillation.hazard_kl, LOGITS, 1.0, options={"temperature": 1.0}),
        "event": Entry(survival_distillation.event_distribution_kl, LOGITS, 1.0),
        # Vectors.
        "cosine": Entry(hints.cosine_loss, VECTOR, 1.0),
        "srd": _coupled(hints.srd_loss, VECTOR, 1.0, options={"power": 4.0}),
        "srrl": Entry(hints.srrl_loss, VECTOR, 1.0, needs=(HEAD_LOGITS,), options={"weight": 1.0}),
        "sp": _coupled(similarity.sp_loss, VECTOR, 3000.0, same_width=False, options={"norm": similarity.L2}),
        "cc": _coupled(
            congruence.cc_kernel_loss,
            VECTOR,
            1.0,
            same_width=False,
            options={"form": congruence.KERNEL_MSE, "gamma": 0.4, "degree": 2},
        ),
        "cc_product": _coupled(congruence.cc_product_loss, VECTOR, 0.02, ordered=True),
        "rkd": _coupled(
            relational.rkd_loss,
            VECTOR,
            1.0,
            same_width=False,
            options={"distance_weight": 25.0, "angle_weight": 50.0},
        ),
        "pkt": _coupled(relational.pkt_loss, VECTOR, 30000.0, same_width=False),
        "coral": _coupled(moments.classic_coral_loss, VECTOR, 1.0),
        "mkd_coral": _coupled(moments.coral_loss, VECTOR, 1.0),
        "mmd": _coupled(kernels.mmd_loss, VECTOR, 1.0, options={"bandwidths": None, "unbiased": False}),
        "cmd": _coupled(moments.cmd_loss, VECTOR, 1.0, options={"order": 5, "value_range": 1.0}),
        "hsic": _coupled(
            kernels.hsic_loss,
            VECTOR,
            1.0,
            same_width=False,
            options={"kernel": kernels.LINEAR, "bandwidth": None, "unbiased": False},
        ),
        "cka": _coupled(
            kernels.cka_loss,
            VECTOR,
            1.0,
            same_width=False,
            options={"kernel": kernels.LINEAR, "bandwidth": None, "unbiased": False},
        ),
        "infonce": _coupled(contrastive.infonce_loss, VECTOR, 1.0, trains_teacher=True, options={"temperature": 0.07}),
        "infonce_pairs": Entry(
            joint_embedding.infonce_pairs_loss,
            VECTOR,
            1.0,
            couples_batch=True,
            trains_teacher=True,
            options={"temperature": 0.5},
        ),
        "vicreg": Entry(
            joint_embedding.vicreg_loss,
            VECTOR,
            1.0,
            couples_batch=True,
            trains_teacher=True,
            options={**_VICREG, "eps": 1e-5, "ddof": 0},
        ),
        "vicreg_original": Entry(
            joint_embedding.vicreg_pairwise_loss,
            VECTOR,
            1.0,
            couples_batch=True,
            trains_teacher=True,
            options={**_VICREG, "eps": 1e-4, "ddof": 1},
        ),
        "barlow": _coupled(
            joint_embedding.barlow_loss,
            VECTOR,
            1.0,
            trains_teacher=True,
            options={"off_diagonal": 0.0051, "normalisation": joint_embedding.CONSTANT_OUTSIDE},
        ),
        "crd": Entry(
            memory.crd_loss,
            VECTOR,
            0.8,
            couples_batch=True,
            needs=(MEMORY,),
            trains_teacher=True,
            options={"temperature": 0.07, "momentum": 0.5},
        ),
        "queue_infonce": Entry(
            memory.queue_infonce, VECTOR, 1.0, couples_batch=True, needs=(MEMORY,), options={"temperature": 0.07}
        ),
        # Vectors or maps.
        "fitnet": Entry(hints.hint_errors, VECTOR, 100.0),
        "supervision_transfer": Entry(hints.hint_errors, VECTOR, 100.0),
        "vid": Entry(hints.vid_loss, VECTOR, 1.0, needs=(RHO,)),
        "ab": Entry(
            boundaries.ab_loss, VECTOR, 1.0, options={"margin": 1.0}, layer_weights=boundaries.doubling_weights
        ),
        "ofd": Entry(boundaries.ofd_loss, VECTOR, 1e-3, needs=(MARGIN,), layer_weights=boundaries.doubling_weights),
        # Maps.
        "at": Entry(hints.attention_errors, MAP, 1000.0, same_width=False, options={"power": 2, "form": hints.CODE}),
        "nst": Entry(factors.nst_loss, MAP, 50.0, same_width=False),
        "ft": Entry(factors.ft_loss, MAP, 200.0, same_width=False, options={"form": factors.ENERGY}),
        "ickd": _coupled(factors.ickd_loss, MAP, 500.0),
        "reviewkd": Entry(factors.hcl_loss, MAP, 5.0),
        "fsp": Entry(factors.fsp_loss, MAP_PAIR, 50.0, options={"form": factors.MEAN_SQUARE}),
    }
)
"""Name -> loss. Weights: the command lists of RepDistiller, and MD or TD where the specification quotes them; 1 where
it names none. `dml` and `kdcl` train both networks; `one_terms` is a function of several heads of one network."""

NOT_OFFERED: Mapping[str, str] = MappingProxyType(
    {
        "kdsvd": "its value depends on the arbitrary sign of singular vectors and on how a map is unfolded, so that no "
        "two implementations agree",
        "one": "it needs several heads on one trunk, not a teacher and a student: use histokd_jax.losses.one_terms",
    }
)
"""Names of the literature that are refused, and why."""


def entry(name: str) -> Entry:
    """The loss called `name`.

    Raises:
      ValueError: listing the known names and the nearest, or why it is not offered.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name in NOT_OFFERED:
        raise ValueError(f"term {name!r} is not offered: {NOT_OFFERED[name]}")
    near = difflib.get_close_matches(str(name), CATALOGUE, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"term {name!r} is unknown{hint} Known terms: {', '.join(sorted(CATALOGUE))}")


def checked_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a term with defaults filled in.

    Args:
      name: key of `CATALOGUE`.
      options: those given.

    Raises:
      ValueError: for an option that the term does not have.
    """
    known = entry(name).options
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"term {name!r} has no option {unknown[0]!r}; it has {sorted(known) or 'none'}")
    return {**known, **options}
