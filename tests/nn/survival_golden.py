"""Golden cases of the survival networks: deterministic parameters, the scalar that is differentiated, packed bags."""

import contextlib

import golden_fill as gf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.methods.supervised import torch_keys_multimodal as torch_keys
from histokd_jax.nn.gated_attention import Bags

# float64 is the authority; float32 runs in the slow suite.
PRECISIONS = (gf.FLOAT64, pytest.param(gf.FLOAT32, marks=pytest.mark.slow))
_WEIGHTS = {
    f"{name}{i}.0": shape for name, shape in (("h", (32, 256)), ("z", (32, 512)), ("o", (32, 32))) for i in (1, 2)
}
_WEIGHTS = {f"linear_{k}": shape for k, shape in _WEIGHTS.items()} | {
    "encoder1.0": (256, 1089),
    "encoder2.0": (256, 256),
}
BILINEAR_SHAPES = {f"mm.{k}.weight": shape for k, shape in _WEIGHTS.items()}
BILINEAR_SHAPES |= {f"mm.{k}.bias": shape[:1] for k, shape in _WEIGHTS.items()}


def precision_context(precision):
    return jax.enable_x64(True) if precision == gf.FLOAT64 else contextlib.nullcontext()


def cast(tree, precision):
    return jax.tree.map(lambda x: jnp.asarray(x, precision), tree)


def one_bag(patches, row=None):
    """One bag as rows of `row` patches; the tail is NaN."""
    n, width = patches.shape
    row = row or n
    rows = -(-n // row)
    x = jnp.concatenate([patches, jnp.full((rows * row - n, width), jnp.nan, patches.dtype)])
    index = jnp.arange(rows * row, dtype=jnp.int32)
    ids, positions = (index < n).astype(jnp.int32), jnp.where(index < n, index, 0)
    return Bags(x.reshape(rows, row, width), ids.reshape(rows, row), positions.reshape(rows, row), 1)


def pack(bags, row=8, empty=0, order=None):
    """Bags as one stream of rows, slides spanning rows, then `empty` slots without patches and a NaN tail."""
    sizes = [len(p) for p in bags]
    total = sum(sizes)
    rows = -(-(total + 1) // row)
    pad = rows * row - total
    x = np.concatenate([*bags, np.full((pad, bags[0].shape[1]), np.nan, bags[0].dtype)])
    ids = np.concatenate([np.repeat(np.arange(1, len(sizes) + 1), sizes), np.zeros(pad)]).astype(np.int32)
    positions = np.concatenate([*(np.arange(n) for n in sizes), np.zeros(pad)]).astype(np.int32)
    order = np.arange(rows * row) if order is None else order(rows * row)
    x, ids, positions = x[order].reshape(rows, row, -1), ids[order].reshape(rows, row), positions[order]
    return Bags(jnp.asarray(x), jnp.asarray(ids), jnp.asarray(positions.reshape(rows, row)), len(sizes) + empty)


def survival_terms(logits):
    """What the golden files derive from the logits [C] of one slide."""
    hazards = jax.nn.sigmoid(logits)
    survival = jnp.cumprod(1 - hazards)
    return {
        "logits": logits,
        "hazards": hazards,
        "survival": survival,
        "risk": -jnp.sum(survival),
        "nll_bin2_death": -jnp.log(survival[1]) - jnp.log(hazards[2]),
        "nll_bin1_censored": -jnp.log(survival[1]),
    }


def check_case(folder, name, case_name, precision, table, forward, extra_shapes=None, drop=()):
    """Outputs, scalar and all gradients of one case.

    `forward(params, inputs)` gives {golden name: array} with "logits" [C].
    """
    case = gf.load(folder, name, case_name)
    with precision_context(precision):
        state = gf.state_dict(folder, name, extra_shapes, drop)
        if "cls_token" in state:  # the one kernel-shaped tensor that is not scaled by its fan-in
            state["cls_token"] = gf.noise(f"{name}:cls_token", state["cls_token"].shape)
        params = cast(torch_keys.from_torch(state, table), precision)
        inputs = cast({k: gf.inputs(k, tuple(shape)) for k, shape in case["inputs"].items()}, precision)

        def scalar(params, inputs):
            outputs = forward(params, inputs)
            outputs = outputs | survival_terms(outputs["logits"])
            return outputs["nll_bin2_death"] + outputs["nll_bin1_censored"], outputs

        (value, outputs), grads = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(params, inputs)
        assert {str(x.dtype) for x in jax.tree.leaves((outputs, grads))} == {precision}
        assert set(case["outputs"]) <= set(outputs)
        for key, golden in case["outputs"].items():
            gf.assert_output(golden, outputs[key], precision, key)
        rtol = 1e-10 if precision == gf.FLOAT64 else 1e-5
        np.testing.assert_allclose(float(value), case["scalar"]["float64"], rtol=rtol)
        gradients = {f"{name}:{k}": g for k, g in torch_keys.to_torch(grads[0], table).items()}
        gf.assert_gradients(case, gradients, precision)
        gf.assert_input_gradients(case, grads[1], precision)


def check_round_trip(folder, name, table):
    state = gf.state_dict(folder, name)
    back = torch_keys.to_torch(torch_keys.from_torch(state, table), table)
    assert set(back) == set(state)
    for key in state:
        np.testing.assert_array_equal(back[key], state[key])


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))
