"""Networks, losses and gradients of MoMKD against the golden numbers of the public reference; checkpoint names."""

import contextlib
import zlib

import golden_fill as gf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.methods.momkd import memory, torch_keys
from histokd_jax.methods.momkd.config import default_config
from histokd_jax.methods.momkd.method import make_run
from histokd_jax.methods.momkd.objective import loss_terms
from histokd_jax.types import DataSpec

PATCHES = 23
CASES = {"default": 1, "negative": 0}
OUTPUTS = {
    "encoder": "features",
    "patch_sphere": "sphere",
    "attention": "attention",
    "gat1": "first",
}


def golden_run():
    return make_run(default_config(), DataSpec(1536, 2, 768))


def golden_offsets():
    """[23, 8] the graph rule of the golden file."""
    out = np.zeros((PATCHES, 8), np.int32)
    for c in range(PATCHES):
        for j in range(1, 9):
            if (c + j) % 5:
                out[c, j - 1] = (c + j * j) % PATCHES - c
    return out


def golden_batch(x, genes, label):
    return {
        "patches": x[None],
        "segment_ids": jnp.ones((1, PATCHES), jnp.int32),
        "positions": jnp.arange(PATCHES, dtype=jnp.int32)[None],
        "neighbours": jnp.asarray(golden_offsets())[None],
        "weight": jnp.ones(1, jnp.float32),
        "label": jnp.array([label], jnp.int32),
        "genes": genes,
    }


def named_outputs(run, params, details, batch):
    patches = details["patches"]
    terms = loss_terms(run.objective_spec, {k: v for k, v in details.items() if k != "patches"}, batch)
    codes = params["MEMORY"]["codes"]
    found = {ours: getattr(patches, field) for ours, field in OUTPUTS.items()}
    # The indices of the file are those of the attention (nearest unit code), not of the commitment (nearest raw code):
    # they differ for patch 16, where L_commit agrees with the raw code.
    nearest = [jnp.argmax(patches.sphere @ memory.normalise(c).T, axis=-1) for c in codes]
    found |= {"index_pos": nearest[1], "index_neg": nearest[0]}
    found |= {"logits": details["logits"], "slide_sphere": details["slide"], "gene_sphere": details["gene"]}
    found |= {"gene_embedding": details["gene_embedding"], "reconstruction": details["reconstruction"]}
    found |= {"L_ce": terms["ce"], "L_align_slide": terms["align_slide"], "L_align_gene": terms["align_gene"]}
    found |= {"L_rec": terms["rec"], "L_mem": terms["mem"], "L_orth": terms["orth"], "L_commit": terms["commit"]}
    return found


@pytest.mark.parametrize("precision", [gf.FLOAT64, gf.FLOAT32])
@pytest.mark.parametrize("case_name", CASES)
def test_golden_network_losses_and_gradients(golden_dir, case_name, precision):
    case, run = gf.load(golden_dir, "momkd", case_name), golden_run()
    with jax.enable_x64(True) if precision == gf.FLOAT64 else contextlib.nullcontext():
        params = torch_keys.from_torch(gf.state_dict(golden_dir, "momkd"))
        params = jax.tree.map(lambda value: jnp.asarray(value, precision), params)
        arrays = {k: jnp.asarray(gf.inputs(k, tuple(s)), precision) for k, s in case["inputs"].items()}

        def total(params, arrays):
            batch = golden_batch(arrays["x_path1536"], arrays["genes768"], CASES[case_name])
            outputs, _ = run.forward(params, {}, {}, batch, None, False)
            details = run.details(params, {}, batch)
            return run.objective(outputs, batch)[0], named_outputs(run, params, details, batch)

        step = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (value, outputs), (g_params, g_inputs) = step(params, arrays)
        outputs["L_total"] = value
        assert set(outputs) == set(case["outputs"])
        for key, golden in case["outputs"].items():
            if "integer" in golden:
                np.testing.assert_array_equal(outputs[key], golden["integer"], err_msg=key)
            else:
                gf.assert_output(golden, outputs[key], precision, key)
        gf.assert_gradients(case, {f"momkd:{k}": g for k, g in torch_keys.to_torch(g_params).items()}, precision)
        gf.assert_input_gradients(case, g_inputs, precision)


def test_golden_fill_matches_the_key_table(golden_dir):
    for row in gf.key_table(golden_dir, "momkd"):
        value = gf.fill(row["key"], row["shape"])
        assert zlib.crc32(row["key"].encode()) == int(row["stream"])
        expected = [float(row["first_value"]), float(row["sum"])]
        np.testing.assert_allclose([value.flat[0], value.sum()], expected, rtol=1e-9, atol=1e-9)


def test_torch_keys_round_trip_and_cover_every_parameter(golden_dir):
    state = gf.state_dict(golden_dir, "momkd")
    params = torch_keys.from_torch(state)
    like = jax.eval_shape(golden_run().init, jax.random.key(0))[0]
    shapes = jax.tree.map(lambda value: np.shape(value), params)
    assert shapes == jax.tree.map(lambda value: value.shape, like)
    back = torch_keys.to_torch(params)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)


def test_torch_keys_skip_codebook_buffers_and_reject_foreign_checkpoints(golden_dir):
    state = gf.state_dict(golden_dir, "momkd")
    torch_keys.from_torch({**state, "mem_pos._codebook.embed_avg": np.zeros((1, 16, 64))})
    with pytest.raises(ValueError, match=r"missing keys \['attn_log_tau'\], unknown keys \['tau'\]"):
        torch_keys.from_torch({"tau" if k == "attn_log_tau" else k: v for k, v in state.items()})
    with pytest.raises(ValueError, match="not the parameters of MoMKD"):
        torch_keys.to_torch({"SLIDE": torch_keys.from_torch(state)["SLIDE"]})


def test_C15_parameter_count_at_the_defaults():
    params, extra = jax.eval_shape(golden_run().init, jax.random.key(0))
    sizes = {group: sum(leaf.size for leaf in jax.tree.leaves(tree)) for group, tree in params.items()}
    assert sum(sizes.values()) == 4_372_803 and sizes["MEMORY"] == 2_048 and extra == {}
