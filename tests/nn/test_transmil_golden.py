"""TransMIL against the golden numbers of the public reference (baselines specification, section 8)."""

import golden_fill as gf
import jax
import numpy as np
import pytest
import survival_golden as sg

from histokd_jax.methods.supervised import torch_keys_multimodal as torch_keys
from histokd_jax.nn.mil.transmil import TransMIL

NET = TransMIL(1024, 4, tile=64)


def forward(params, inputs):
    (x,) = inputs.values()
    bags = sg.one_bag(x[0], row=16)
    out, sown = NET.apply({"params": params}, bags, None, None, mutable=["intermediates"])
    sown = {k: v[0] for k, v in sown["intermediates"].items() if not isinstance(v, dict)}
    rows = int(np.ceil(np.sqrt(x.shape[1]))) ** 2 + 1
    layer1, ppeg = (sown[k].reshape(-1, 512)[:rows] for k in ("after_layer1", "after_ppeg"))
    logits = out["logits"][0]
    return {
        "layer1": layer1,
        "layer1_class_token": layer1[0],
        "ppeg": ppeg,
        "ppeg_row1": ppeg[1],
        "layer2_class_token": sown["layer2_class_token"],
        "final_norm_class_token": out["embedding"],
        "logits": logits,
        "prob": jax.nn.softmax(logits),
    }


@pytest.mark.parametrize("precision", sg.PRECISIONS)
@pytest.mark.parametrize("case", ["default", "n300"])
def test_golden_transmil(golden_dir, case, precision):
    sg.check_case(golden_dir, "transmil", case, precision, torch_keys.transmil(), forward)


def test_torch_keys_transmil_round_trip(golden_dir):
    sg.check_round_trip(golden_dir, "transmil", torch_keys.transmil())
    state = gf.state_dict(golden_dir, "transmil", drop=("_fc2",))
    with pytest.raises(ValueError, match="missing keys.*_fc2.bias"):
        torch_keys.from_torch(state, torch_keys.transmil())
