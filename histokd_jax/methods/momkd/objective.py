"""The objective of MoMKD from the outputs of one step (specification section 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from histokd_jax import losses
from histokd_jax.losses.reconstruction import mean_squared_error
from histokd_jax.methods.momkd.memory import margin_loss
from histokd_jax.methods.settings import with_traced
from histokd_jax.types import Batch, Metrics, Outputs

TRAIN = "train"

TRACED: Mapping[str, str] = {
    "loss.ce": "ce",
    "loss.alpha_wsi": "alpha_wsi",
    "loss.alpha_gene": "alpha_gene",
    "loss.lambda_rec": "lambda_rec",
    "loss.mem": "mem",
    "loss.orth": "orth",
    "align.beta": "beta",
    "align.margin": "margin",
}
"""Config key -> field of `ObjectiveSpec` that may be an array instead of a number."""


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Weights and constants of the terms.

    Attributes:
      ce: weight of the cross entropy of the slide.
      alpha_wsi: weight of the alignment of slides with the memories.
      alpha_gene: weight of the alignment of genes.
      lambda_rec: weight of the reconstruction of genes.
      mem: weight of the memory loss, commitment plus `orth` times orthogonality.
      orth: weight of the orthogonality within the memory loss.
      beta: slope of the alignment loss.
      margin: margin of the alignment loss.
    """

    ce: float = 0.5
    alpha_wsi: float = 0.2
    alpha_gene: float = 0.05
    lambda_rec: float = 0.05
    mem: float = 0.1
    orth: float = 10.0
    beta: float = 20.0
    margin: float = 0.3

    def with_values(self, values: Mapping[str, jax.Array]) -> ObjectiveSpec:
        """The same objective with some numbers replaced by data.

        Args:
          values: key of `TRACED` -> [] float32.

        Raises:
          ValueError: for a key that cannot be data.
        """
        return with_traced(self, TRACED, values)

    def weights(self) -> dict[str, float]:
        """Weight of every term in the total."""
        return {
            "ce": self.ce,
            "align_slide": self.alpha_wsi,
            "align_gene": self.alpha_gene,
            "rec": self.lambda_rec,
            "mem": self.mem,
        }


def slide_terms(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Every unweighted term of every slide, and the slides that have it.

    Args:
      spec: weights and constants.
      outputs: "logits" [S, 2], "gap_slide", "commit", "orth" [S], and with a gene branch "gap_gene" [S] and
        "reconstruction" [S, K].
      batch: "weight", "label" [S], and with a gene branch "genes" [S, K] and, if some slides lack them, "has_genes".

    Returns:
      Name -> (values [S], where [S] bool); values are 0 elsewhere.
    """
    valid, label = batch["weight"] > 0, batch["label"]
    paired = (valid & batch["has_genes"]) if "has_genes" in batch else valid
    found = {
        "ce": (losses.cross_entropy(outputs["logits"], label, where=valid), valid),
        "align_slide": (margin_loss(outputs["gap_slide"], label, spec.beta, spec.margin), valid),
        "commit": (outputs["commit"], valid),
        "orth": (outputs["orth"], valid),
    }
    if "reconstruction" in outputs:
        # Genes as a target are constant, also where somebody differentiates in the genes that the encoder reads.
        target = jax.lax.stop_gradient(jnp.where(paired[:, None], batch["genes"], 0.0))
        found["align_gene"] = margin_loss(outputs["gap_gene"], label, spec.beta, spec.margin), paired
        found["rec"] = mean_squared_error(outputs["reconstruction"], target, where=paired), paired
    return {name: (jnp.where(where, values, 0.0), where) for name, (values, where) in found.items()}


def loss_terms(spec: ObjectiveSpec, outputs: Outputs, batch: Batch) -> dict[str, jax.Array]:
    """Every unweighted term, as the mean over the slides that have it (0 if none has).

    Args:
      spec: weights and constants.
      outputs: see `slide_terms`.
      batch: see `slide_terms`.

    Returns:
      {"ce", "align_slide", "commit", "orth", "mem"} and with a gene branch {"align_gene", "rec"} -> [].
    """
    terms = {
        name: jnp.sum(values) / jnp.maximum(jnp.sum(where), 1).astype(values.dtype)
        for name, (values, where) in slide_terms(spec, outputs, batch).items()
    }
    return terms | {"mem": terms["commit"] + spec.orth * terms["orth"]}


def objective(
    spec: ObjectiveSpec, outputs: Outputs, batch: Batch, step: jax.Array | int = 0, stage: str = TRAIN
) -> tuple[jax.Array, Metrics]:
    """The total of section 5 and its metrics.

    Args:
      spec: weights and constants.
      outputs: see `slide_terms`.
      batch: see `slide_terms`.
      step: not used; the weights are constant.
      stage: not used; there is one.

    Returns:
      (loss [], metrics): every term, accuracy, and the gaps towards the own class.
    """
    del step, stage
    terms = loss_terms(spec, outputs, batch)
    total = sum(weight * terms[name] for name, weight in spec.weights().items() if name in terms)
    one = jnp.ones((), jnp.float32)
    metrics = {name: (value, one) for name, value in {"loss": total, **terms}.items()}
    return total, metrics | _slide_metrics(outputs, batch)


def _slide_metrics(outputs: Outputs, batch: Batch) -> Metrics:
    valid, label = batch["weight"] > 0, batch["label"]
    paired = (valid & batch["has_genes"]) if "has_genes" in batch else valid
    sign = (2 * label - 1).astype(jnp.float32)
    shown = {"acc": (losses.correct(outputs["logits"], label), valid)}
    for name, where in (("gap_slide", valid), ("gap_gene", paired)):
        if name in outputs:
            shown[name] = sign * jax.lax.stop_gradient(outputs[name]), where
    return {
        name: (jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where).astype(jnp.float32))
        for name, (values, where) in shown.items()
    }
