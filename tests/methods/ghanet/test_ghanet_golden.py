"""Outputs, losses and gradients of G-HANet against the golden numbers of the public reference (check C14)."""

import ghanet_setup as setup
import golden_fill as gf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax import losses
from histokd_jax.losses.reconstruction import group_errors
from histokd_jax.methods.ghanet import torch_keys
from histokd_jax.methods.ghanet.method import make_run

# float64 is the authority; float32 runs in the slow suite.
PRECISIONS = (gf.FLOAT64, pytest.param(gf.FLOAT32, marks=pytest.mark.slow))


def test_fill_of_every_tensor_is_that_of_the_table(golden_dir):
    state = setup.golden_state(golden_dir)
    rows = gf.key_table_file(golden_dir / "g_hanet_fill.tsv")
    assert len(rows) == 104
    for row in rows:
        value = state[row["key"].split(":", 1)[1]]
        np.testing.assert_allclose(value.reshape(-1)[0], float(row["first_value"]), rtol=1e-12)
        np.testing.assert_allclose(value.sum(), float(row["sum"]), rtol=1e-9, atol=1e-9)


def run_case(folder, case_name, precision, **overrides):
    """(case, total loss, outputs by golden name, parameter gradients by checkpoint key, {bag: gradient})."""
    case = gf.load(folder, "g_hanet", case_name)
    run = make_run(setup.faithful_config(train__b=1, **overrides), setup.spec(setup.GOLDEN_GROUPS, feat=1024))
    params = setup.golden_params(folder, precision)
    name, batch = setup.golden_batch(case, precision)

    def total(params, patches):
        given = batch | {"patches": patches}
        details = run.details(params, given)
        outputs = {k: details[k] for k in ("logits", "embedding", "reconstruction")}
        return run.objective(outputs, given)[0], details

    step = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (value, details), (g_params, g_patches) = step(params, batch["patches"])
    outputs = named(run, params, batch, details, value)
    gradients = torch_keys.to_torch(g_params, setup.GOLDEN_GROUPS)
    return case, value, outputs, {f"g_hanet:{k}": g for k, g in gradients.items()}, {name: g_patches}


def named(run, params, batch, details, value):
    """Our results under the names of the golden file."""
    deployed = {k: params[k] for k in ("CAB", "HSB")}
    predicted = jax.jit(lambda p: run.predict(p, {}, {}, batch, "pathology"))(deployed)
    maps = jax.jit(run.patch_weights)(params, batch)
    logits, bins = details["logits"], {"nll_bin2_death": (2, 1), "nll_bin1_censored": (1, 0)}
    sce, mse = group_errors(details["reconstruction"], batch["genes"], setup.GOLDEN_GROUPS)
    out = {k: predicted[k] for k in ("logits", "hazards", "survival", "risk")}
    out |= {k: maps[k] for k in ("M", "P", "Q", "G")}
    out |= {"R": details["tokens"], "Y": details["hyper"], "Z": details["embedding"], "pooled": details["pooled"]}
    out |= {"sce": sce, "mse": mse, "L_rec": jnp.sum(sce + mse), "L_total": value}
    out |= {k: losses.nll_survival(logits, jnp.array([b]), jnp.array([e])) for k, (b, e) in bins.items()}
    edges = np.cumsum((0, *setup.GOLDEN_GROUPS))
    parts = [details["reconstruction"][:, a:b] for a, b in zip(edges[:-1], edges[1:])]
    return out | {f"reconstruction_{i}": part for i, part in enumerate(parts)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("case_name", "pool"),
    [
        ("default", "segment"),
        ("n57", "chunked"),
        pytest.param("default", "chunked", marks=pytest.mark.slow),
        pytest.param("n57", "segment", marks=pytest.mark.slow),
    ],
)
def test_C14_golden_outputs_losses_and_gradients(golden_dir, case_name, precision, pool):
    with setup.precision_context(precision):
        case, value, outputs, gradients, g_inputs = run_case(
            golden_dir, case_name, precision, data__pool=pool, data__chunk=16
        )
        diagnostics = {"argmax_bin", "topk_margin"}
        assert set(case["outputs"]) - set(outputs) == diagnostics
        for key in set(case["outputs"]) - diagnostics:
            gf.assert_output(case["outputs"][key], outputs[key], precision, key)
        assert int(jnp.argmax(outputs["logits"])) == case["outputs"]["argmax_bin"]["integer"][0]
        rtol = 1e-10 if precision == gf.FLOAT64 else 1e-5
        np.testing.assert_allclose(float(value), case["scalar"]["float64"], rtol=rtol)
        gf.assert_gradients(case, gradients, precision)
        gf.assert_input_gradients(case, g_inputs, precision)
