"""MCAT against the golden numbers of the public reference (baselines specification, section 9)."""

import jax
import jax.numpy as jnp
import pytest
import survival_golden as sg

from histokd_jax.methods.supervised import torch_keys_multimodal as torch_keys
from histokd_jax.nn.mcat import Mcat

SIZES = (7, 11, 5, 13, 9, 4)


def head_scores(net, tokens):
    layers = net.attention
    return layers.score(jnp.tanh(layers.tanh(tokens)) * jax.nn.sigmoid(layers.sigmoid(tokens)))[0].T


def forward(net):
    def run(params, inputs):
        bags = sg.one_bag(inputs["x_path"], row=8)
        genes = {"genes": jnp.concatenate([inputs[f"omics/{i}"] for i in range(6)])[None]}
        fine = {"params": params}
        out, sown = net.apply(fine, bags, genes, mutable=["intermediates"])
        sown = sown["intermediates"]
        encoded = {k: sown[f"{k}_stream"]["encoded"][0] for k in ("path", "omic")}
        scores = net.apply(fine, bags, genes, method="coattention_scores")
        return {
            "group_tokens": out["group_tokens"],
            "coattn_scores": scores.reshape(6, -1)[:, :23],
            "coattn_output": out["coattended"],
            "path_layer0": sown["path_stream"]["encoder"]["after_layer0"][0],
            "path_encoded": encoded["path"],
            "omic_encoded": encoded["omic"],
            "path_scores": net.apply(fine, encoded["path"], method=lambda m, x: head_scores(m.path_stream, x)),
            "omic_scores": net.apply(fine, encoded["omic"], method=lambda m, x: head_scores(m.omic_stream, x)),
            "h_path": out["path"],
            "h_omic": out["omic"],
            "fused": out["embedding"],
            "logits": out["logits"][0],
        }

    return run


@pytest.mark.parametrize("precision", sg.PRECISIONS)
@pytest.mark.parametrize(
    "case,fusion,shapes,drop",
    [("default", "concat", {}, ()), ("fusion_bilinear", "bilinear", sg.BILINEAR_SHAPES, ("mm.0", "mm.2"))],
    ids=["default", "fusion_bilinear"],
)
def test_golden_mcat(golden_dir, case, fusion, shapes, drop, precision):
    net, table = Mcat(1024, 4, SIZES, fusion=fusion, chunk=8), torch_keys.mcat(fusion, SIZES)
    sg.check_case(golden_dir, "mcat", case, precision, table, forward(net), shapes, drop)


def test_torch_keys_mcat_round_trip(golden_dir):
    sg.check_round_trip(golden_dir, "mcat", torch_keys.mcat("concat", SIZES))
