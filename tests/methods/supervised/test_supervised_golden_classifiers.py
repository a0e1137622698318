"""CLAM and DSMIL against golden numbers of the public reference: streams, instance selection, losses, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import supervised_golden as golden
from supervised_golden import Case

from histokd_jax.methods.supervised.objective import BCE, ObjectiveSpec, loss_terms, objective
from histokd_jax.types import CLASSIFICATION

LABEL = {"clam_sb": 2, "clam_mb": 2, "dsmil": 1}


def scalar_of(name, **spec):
    spec = ObjectiveSpec(task=CLASSIFICATION, **spec)
    batch = {"label": jnp.array([LABEL[name]]), "weight": jnp.ones(1)}

    def scalar(out):
        terms = loss_terms(spec, out, batch)
        return objective(spec, out, batch)[0], {"prob": jax.nn.softmax(out["logits"]), **terms}

    return scalar


QUERIES = ("b_classifier.q.0", "b_classifier.q.2")
PASSING = {"b_classifier.v.1.weight": (1024, 1024), "b_classifier.v.1.bias": (1024,)}
LINEAR = {"b_classifier.q.weight": (128, 1024), "b_classifier.q.bias": (128,)}
CLAM = [
    Case(name, case, scalar=scalar_of(name, subtyping=case == "default"))
    for name in ("clam_sb", "clam_mb")
    for case in ("default", "no_subtyping")
]
BAG_BCE = scalar_of("dsmil", classification=BCE)
DSMIL = [
    Case("dsmil", outputs=2, scalar=BAG_BCE),
    Case("dsmil", "passing_v", {"passing_value": True}, PASSING, outputs=2, scalar=BAG_BCE),
    Case("dsmil", "linear_q", {"linear_query": True}, LINEAR, QUERIES, outputs=2, scalar=BAG_BCE),
]


def by_class(name, case, top_and_bottom, top_only):
    """Instances in the order of the golden file: classes in order, of other classes the top patches only."""
    classes = range(4) if case == "default" else (LABEL[name],)
    return np.concatenate([top_and_bottom(c) if c == LABEL[name] else top_only(c) for c in classes])


def assert_selection(case, result):
    chosen = result.module.apply({"params": result.params}, result.bags, method="select")
    for end, name in enumerate(("top8", "bottom8")):
        # The file lists indices in order of their number; the order of attention shows in the predictions.
        found = np.sort(chosen.positions[end, 0], axis=-1)
        np.testing.assert_array_equal(found.reshape(-1), integers(result, name).reshape(-1))
    predicted = np.argmax(result.outputs["instance_logits"][0], axis=-1)
    found = by_class(case.name, case.case, lambda c: predicted[c], lambda c: predicted[c, :8])
    np.testing.assert_array_equal(found, integers(result, "instance_predictions"))
    labels = by_class(case.name, case.case, lambda c: [1] * 8 + [0] * 8, lambda c: [0] * 8)
    np.testing.assert_array_equal(labels, integers(result, "instance_labels"))


def integers(result, name):
    return np.asarray(result.golden["outputs"][name]["integer"])


@pytest.mark.parametrize("precision", golden.PRECISIONS)
@pytest.mark.parametrize("case", CLAM, ids=lambda case: case.id)
def test_golden_clam(golden_dir, case, precision):
    with golden.precision_context(precision):
        result = golden.run(golden_dir, case, precision)
        out = result.outputs
        attention = result.module.apply({"params": result.params}, result.bags, method="attention_maps")
        outputs = {"logits": out["logits"], "prob": out["prob"], "M": out["pooled"], "attention": attention}
        outputs |= {"raw_scores": golden.raw_scores(result), "bag_loss": out["bag"], "instance_loss": out["instance"]}
        golden.check(case, result, precision, outputs)
        assert_selection(case, result)


@pytest.mark.parametrize("precision", golden.PRECISIONS)
@pytest.mark.parametrize("case", DSMIL, ids=lambda case: case.id)
def test_golden_dsmil(golden_dir, case, precision):
    with golden.precision_context(precision):
        result = golden.run(golden_dir, case, precision)
        out, apply = result.outputs, lambda method: result.module.apply({"params": result.params}, method=method)
        attention = apply(lambda module: module.attention_maps(result.bags))
        scores = apply(lambda module: module.instance(result.bags.patches))
        outputs = {"instance_scores": scores, "attention": attention[:, 0].T, "B": out["pooled"]}
        outputs |= {"bag_logits": out["logits"], "max_logits": out["max_logits"]}
        outputs |= {"bag_loss": out["bag"], "max_loss": out["max"]}
        golden.check(case, result, precision, outputs)
        critical = apply(lambda module: module.select(result.bags)).positions
        np.testing.assert_array_equal(critical.reshape(-1), integers(result, "critical_index"))
