"""The objective of G-HANet from the outputs of one step (specification section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from histokd_jax import losses
from histokd_jax.losses.reconstruction import group_errors
from histokd_jax.methods.settings import with_traced
from histokd_jax.types import Batch, Metrics, Outputs

NLL, CE, COX = "nll", "ce", "cox"
SURVIVAL_LOSSES = (NLL, CE, COX)
SCE, MSE, SCE_MSE = "sce", "mse", "sce+mse"
REC_TERMS = (SCE_MSE, SCE, MSE)
TRAIN = "train"

TRACED: Mapping[str, str] = {"loss.rec_weight": "rec_weight", "loss.alpha": "alpha"}
"""Config key -> field of `ObjectiveSpec` that may be an array instead of a number."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Weights and forms of the terms.

    Attributes:
      groups: sizes of the gene groups in `genes` and `reconstruction`; (): nothing is reconstructed.
      survival: "nll", "ce" or "cox" (over the slides of the step, D15).
      alpha: how much less censored patients count, see `losses.nll_survival` and `losses.ce_survival`.
      ce_clamp: see `losses.ce_survival` (D16).
      rec_weight: weight of the reconstruction loss.
      rec_terms: "sce+mse", "sce" or "mse".
      sce_power: exponent of the cosine term.
      window: a fixed divisor of the sum over slides (the reference divides every slide by the accumulation window, also
        where a step holds more or fewer); None divides by the number of slides.
    """

    groups: tuple[int, ...] = ()
    survival: str = NLL
    alpha: float = 0.0
    ce_clamp: str = "low"
    rec_weight: float = 0.3
    rec_terms: str = SCE_MSE
    sce_power: float = 3.0
    window: int | None = None

    @property
    def reconstructs(self) -> bool:
        """Whether the reconstruction loss takes part; a traced weight is unknown, so it does."""
        return isinstance(self.rec_weight, jax.Array) or bool(self.rec_weight)

    def with_values(self, values: Mapping[str, jax.Array]) -> ObjectiveSpec:
        """The same objective with some numbers replaced by data.

        Args:
          values: key of `TRACED` -> [] float32.

        Raises:
          ValueError: for a key that cannot be data.
        """
        return with_traced(self, TRACED, values)


def _masks(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(slots that hold a slide, those that also have genes), both [S] bool."""
    valid = batch["weight"] > 0
    return valid, (valid & batch["has_genes"]) if "has_genes" in batch else valid


def survival_term(spec: ObjectiveSpec, logits: jax.Array, batch: Batch, where: jax.Array) -> jax.Array:
    """The survival loss of every slide, [S]; 0 in empty slots. Cox gives every slide the loss of the step."""
    if spec.survival == COX:
        loss = losses.cox_loss(logits[:, 0], batch["time_months"], batch["event"], where=where)
        return jnp.where(where, loss, 0.0)
    if spec.survival == CE:
        return losses.ce_survival(
            logits, batch["label"], batch["event"], alpha=spec.alpha, clamp=spec.ce_clamp, where=where
        )
    return losses.nll_survival(logits, batch["label"], batch["event"], alpha=spec.alpha, where=where)


def reconstruction_terms(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosine and squared error of every slide and group, each [S, T]; 0 where a slide has no genes.

    Raises:
      ValueError: if no gene group is known, or the batch has no genes.
    """
    if not any(spec.groups) or "reconstruction" not in outputs:
        raise ValueError(
            "loss.rec_weight > 0 needs gene groups to reconstruct, but the data set has none: give data.genes and "
            "genes.signatures, or set loss.rec_weight = 0"
        )
    target = jnp.where(where[:, None], batch["genes"], 0.0)
    return group_errors(outputs["reconstruction"], target, spec.groups, power=spec.sce_power, where=where)


def loss_terms(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Every unweighted term, summed over slides and divided by the window.

    Args:
      spec: weights and forms.
      outputs: "logits" [S, C] and, for the reconstruction, "reconstruction" [S, K].
      batch: "weight", "label", "event" [S] ("time_months" for Cox), and for the reconstruction "genes" [S, K] and, if
        some slides lack them, "has_genes" [S].

    Returns:
      {"surv", "rec"} -> [], without "rec" if its weight is 0; and "sce", "mse" [T] of each group.
    """
    valid, paired = _masks(batch)
    surv = survival_term(spec, outputs["logits"], batch, valid)
    number = jnp.maximum(jnp.sum(valid), 1) if spec.window is None else spec.window
    number = jnp.asarray(number, surv.dtype)
    terms = {"surv": jnp.sum(surv) / number}
    if spec.reconstructs:
        cosine, square = reconstruction_terms(spec, outputs, batch, paired)
        # Slides without genes add nothing, as if their terms were left out of an accumulated window.
        terms |= {"sce": jnp.sum(cosine, axis=0) / number, "mse": jnp.sum(square, axis=0) / number}
        terms["rec"] = sum(jnp.sum(terms[name]) for name in spec.rec_terms.split("+"))
    return terms


def objective(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = TRAIN
) -> tuple[jax.Array, Metrics]:
    """The total `L = L_surv + rec_weight * L_rec` and its metrics.

    Args:
      spec: weights and forms.
      outputs: see `loss_terms`.
      batch: see `loss_terms`.
      step: not used; the weights are constant.
      stage: not used; there is one.

    Returns:
      (loss [], metrics): every term, and per group the cosine of reconstruction and target over slides with genes.
    """
    del step, stage
    terms = loss_terms(spec, outputs, batch)
    total = terms["surv"] + (spec.rec_weight * terms["rec"] if "rec" in terms else 0.0)
    one = jnp.ones((), jnp.float32)
    metrics = {"loss": (total, one), "surv": (terms["surv"], one)}
    if "rec" in terms:
        metrics["rec"] = (terms["rec"], one)
        metrics |= {f"mse_{i + 1}": (terms["mse"][i], one) for i, size in enumerate(spec.groups) if size}
        metrics |= _cosines(spec, outputs, batch)
    return total, metrics


def _cosines(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> Metrics:
    _, paired = _masks(batch)
    prediction = jax.lax.stop_gradient(outputs["reconstruction"])
    target = jnp.where(paired[:, None], batch["genes"], 0.0)
    distance, _ = group_errors(prediction, target, spec.groups, power=1, where=paired)
    number = jnp.sum(paired).astype(jnp.float32)
    cosine = jnp.sum(jnp.where(paired[:, None], 1.0 - distance, 0.0), axis=0)
    return {f"cos_{i + 1}": (cosine[i], number) for i, size in enumerate(spec.groups) if size}
