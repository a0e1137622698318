"""The survival bag baselines and the SNN against golden numbers of the public reference, and their checkpoint keys."""

import zlib

import golden_fill as gf
import jax
import numpy as np
import pytest
import supervised_golden as golden
from supervised_golden import Case

from histokd_jax.methods.supervised.networks import network
from histokd_jax.methods.supervised.torch_keys import from_torch, to_torch

CLUSTERS = (5 * np.arange(23) + 2) % 9
SURVIVAL = ("logits", "hazards", "survival", "risk", "nll_bin2_death", "nll_bin1_censored")
CASES = [
    Case("snn"),
    Case("deepsets", scale=1 / 16),
    Case("deepsets", "fusion_concat", {"fusion": "concat"}, golden.CONCAT_SHAPES, scale=1 / 16),
    Case("abmil"),
    Case("abmil", "fusion_concat", {"fusion": "concat"}, golden.CONCAT_SHAPES),
    Case("abmil", "fusion_bilinear", {"fusion": "bilinear"}, golden.BILINEAR_SHAPES),
    Case("deepattnmisl", clusters=CLUSTERS),
]
NAMES = sorted({*(case.name for case in CASES), "clam_sb", "clam_mb", "dsmil"})


def specific(case, result):
    """Outputs that only some networks have, by golden name."""
    out = result.outputs
    if case.name == "snn":
        block = out["sown"]["intermediates"]["body"]["blocks_0"]["__call__"][0]
        return {"block0": jax.nn.elu(block), "features": out["embedding"]}
    shared = {"rho": out["rho"]}
    if case.name == "deepsets":
        return {**shared, "pooled_sum": out["pooled"]}
    shared["pooled"] = out["pooled"]
    if case.name == "deepattnmisl":
        return {**shared, "cluster_means": out["cluster_means"], "attention": out["cluster_attention"]}
    if case.case != "default":
        shared["fused"] = out["embedding"]
    attention = result.module.apply({"params": result.params}, result.bags, method="attention_map")
    return {**shared, "raw_scores": golden.raw_scores(result), "attention": attention}


@pytest.mark.parametrize("precision", golden.PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_golden_bag_network(golden_dir, case, precision):
    with golden.precision_context(precision):
        result = golden.run(golden_dir, case, precision)
        outputs = {key: result.outputs[key] for key in SURVIVAL} | specific(case, result)
        missing = set(result.golden["outputs"]) - set(outputs) - {"cluster_id", "raw_scores"}
        assert not missing
        golden.check(case, result, precision, outputs)


@pytest.mark.parametrize("name", NAMES)
def test_golden_fill_matches_the_key_table(golden_dir, name):
    for row in gf.key_table(golden_dir, name):
        value = gf.fill(row["key"], row["shape"])
        assert zlib.crc32(row["key"].encode()) == int(row["stream"])
        np.testing.assert_allclose(
            [value.flat[0], value.sum()], [float(row["first_value"]), float(row["sum"])], rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_keys_round_trip(golden_dir, name):
    entry, state = network(name), gf.state_dict(golden_dir, name)
    tensors = entry.torch(entry.options, 2 if name == "dsmil" else 4)
    back = to_torch(from_torch(state, tensors, name), tensors, name)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)


def test_a_foreign_checkpoint_is_named(golden_dir):
    abmil = network("abmil")
    with pytest.raises(ValueError, match="not a checkpoint of abmil.*attention_net.0.weight.*phi.0.weight"):
        from_torch(gf.state_dict(golden_dir, "deepsets"), abmil.torch(abmil.options, 4), "abmil")
    params = from_torch(gf.state_dict(golden_dir, "abmil"), abmil.torch(abmil.options, 4))
    del params["readout"]["rho"]
    with pytest.raises(ValueError, match="readout/rho/kernel"):
        to_torch(params, abmil.torch(abmil.options, 4))
