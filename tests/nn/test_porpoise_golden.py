"""PORPOISE MMF against the golden numbers of the public reference (baselines specification, section 10)."""

import golden_fill as gf
import jax.numpy as jnp
import pytest
import survival_golden as sg

from histokd_jax.methods.supervised import torch_keys_multimodal as torch_keys
from histokd_jax.nn.porpoise import PorpoiseMmf

OFF = (False, False)
NETS = {
    "default": PorpoiseMmf(1024, 4, 37, chunk=8),
    "no_gates_no_skip": PorpoiseMmf(1024, 4, 37, gates=OFF, skip=False, use_mlp=True, chunk=8),
}
SHAPES = {"default": {}, "no_gates_no_skip": {"mm.encoder2.0.weight": (256, 256)}}


def raw_scores(net, bags):
    features, params, aux, x, ids, positions = net.bag.arguments(bags, None)
    x = jnp.where(ids[..., None] > 0, x, 0)
    return features(params, aux, x.reshape(-1, 1024), ids.reshape(-1), positions.reshape(-1))[1][:, :23]


def forward(net):
    def run(params, inputs):
        bags, genes = sg.one_bag(inputs["x_path"], row=8), {"genes": inputs["omic37"]}
        out = net.apply({"params": params}, bags, genes)
        attention = net.apply({"params": params}, bags, genes, method="attention_map")
        return {
            "raw_scores": net.apply({"params": params}, bags, method=raw_scores),
            "attention": attention.reshape(1, -1)[:, :23],
            "h_path": out["path"],
            "h_omic": out["omic"],
            "fused": out["embedding"],
            "logits": out["logits"][0],
        }

    return run


@pytest.mark.parametrize("precision", sg.PRECISIONS)
@pytest.mark.parametrize("case", sorted(NETS))
def test_golden_porpoise_mmf(golden_dir, case, precision):
    net = NETS[case]
    table, unused = torch_keys.porpoise_mmf(net.gates), torch_keys.unused_porpoise_mmf(net.gates)
    sg.check_case(golden_dir, "porpoise_mmf", case, precision, table, forward(net), SHAPES[case], drop=unused)


def test_torch_keys_porpoise_mmf(golden_dir):
    sg.check_round_trip(golden_dir, "porpoise_mmf", torch_keys.porpoise_mmf())
    state = gf.state_dict(golden_dir, "porpoise_mmf")
    table, unused = torch_keys.porpoise_mmf(OFF), torch_keys.unused_porpoise_mmf(OFF)
    params = torch_keys.from_torch(state, table, unused)
    assert set(state) - set(torch_keys.to_torch(params, table)) == {k for k in state if k.startswith("mm.linear_z")}
    with pytest.raises(ValueError, match="unknown keys.*mm.linear_z1.0.bias"):
        torch_keys.from_torch(state, table)
