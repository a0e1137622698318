"""SurvPath against the golden numbers of the public reference (baselines specification, section 11)."""

import jax
import jax.numpy as jnp
import pytest
import survival_golden as sg

from histokd_jax.methods.supervised import torch_keys_multimodal as torch_keys
from histokd_jax.nn.survpath import SurvPath

SIZES = (3, 8, 1, 5, 12, 7, 2, 9, 4, 6, 10, 11)
NET = SurvPath(1024, 4, SIZES, chunk=8)


def forward(params, inputs):
    bags = sg.one_bag(inputs["x_path"][0], row=8)
    genes = {"genes": jnp.concatenate([inputs[f"pathways/{i}"] for i in range(len(SIZES))])[None]}
    out, sown = NET.apply({"params": params}, bags, genes, mutable=["intermediates"])
    patch = NET.apply({"params": params}, bags, genes, method="patch_rows")
    patch = {k: v.T[:23] for k, v in patch._asdict().items()}
    sown = sown["intermediates"]
    tokens, rows = sown["pathway_tokens"][0][0], {k: v[0] for k, v in sown["pathway_rows"][0].items()}
    fine = {"params": params}
    normal = NET.apply(fine, tokens, method=lambda net, x: net.norm1(x))
    q, k, _ = NET.apply(fine, genes, None, method="_pathway_projections")
    fed = NET.apply(fine, rows["attended"], method=lambda net, x: net.fc2(gelu(net.fc1(net.norm2(x)))))
    return {
        "pathway_tokens": tokens,
        "tokens_after_norm": jnp.concatenate([normal, patch["tokens"]]),
        "attention_output": jnp.concatenate([rows["attended"], patch["attended"]]),
        "after_feed_forward": jnp.concatenate([fed, patch["fed"]]),
        "after_final_norm": jnp.concatenate([rows["final"], patch["final"]]),
        "embedding": out["embedding"],
        "scores_pathway_pathway": rows["scores"],
        "scores_pathway_patch": q[0] @ patch["keys"].T,
        "scores_patch_pathway": patch["queries"] @ k[0].T,
        "logits": out["logits"][0],
    }


def gelu(x):
    return jax.nn.gelu(x, approximate=False)


@pytest.mark.parametrize("precision", sg.PRECISIONS)
def test_golden_survpath(golden_dir, precision):
    sg.check_case(golden_dir, "survpath", "default", precision, torch_keys.survpath(SIZES), forward)


def test_torch_keys_survpath_round_trip(golden_dir):
    sg.check_round_trip(golden_dir, "survpath", torch_keys.survpath(SIZES))
