"""Check C27 of the G-HANet specification: the planted cohort, its measures, and training as in PyTorch."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import exp_ghanet_planted as exp  # noqa: E402
from histokd_jax.methods.ghanet import torch_keys  # noqa: E402
from histokd_jax.methods.ghanet.config import FAITHFUL, default_config  # noqa: E402
from histokd_jax.methods.ghanet.method import make_run  # noqa: E402
from histokd_jax.types import DataSpec  # noqa: E402

NAMES = {
    "proj": "recon_net.wsi_net.0",
    "cross.q": "recon_net.cross_attention0.to_q.0",
    "cross.k": "recon_net.cross_attention0.to_k.0",
    "cross.v": "recon_net.cross_attention0.to_v",
    "cross.out": "recon_net.cross_attention0.to_out",
    "ffn_1.expand": "recon_net.ffn0.net.0",
    "ffn_1.contract": "recon_net.ffn0.net.2",
    "ffn_2.expand": "recon_net.ffn1.net.0",
    "ffn_2.contract": "recon_net.ffn1.net.2",
    "query_1": "recon_net.ln_1",
    "context": "recon_net.ln_2",
    "norm_1": "recon_net.ln_3",
    "query_2": "recon_net.ln_4",
    "norm_2": "recon_net.ln_5",
    "norm_out": "recon_net.ln_6",
    "patch": "wsi_net.0",
    "patch_norm": "wsi_net.1",
    "tanh": "gate.attention_a.0",
    "sigmoid": "gate.attention_b.0",
    "score": "gate.attention_c",
    "hyper_1": "hyperconv1.linear1",
    "hyper_2": "hyperconv1.linear2",
    "hyper_norm_1": "hyperconv1.ln1",
    "hyper_norm_2": "hyperconv1.ln2",
    "norm_ffn": "ln1",
    "self_attention.q": "attention.to_q.0",
    "self_attention.k": "attention.to_k.0",
    "self_attention.v": "attention.to_v",
    "self_attention.out": "attention.to_out",
    "ffn.expand": "ffn.net.0",
    "ffn.contract": "ffn.net.2",
    "reduce": "butter.0",
    "reduce_norm": "butter.1",
    "hazards": "classifier",
}
HEAD = {"dense": 0, "norm": 1, "out": 4}


def test_cohort_is_as_specified():
    """Latent, patches, planted share, gene groups; drawn small in nothing but what is looked at."""
    cohort = exp.simulate(0, "signs")
    assert cohort.patches.shape[0] == exp.TRAIN + exp.TEST == 160 and cohort.patches.shape[2] == 1024
    assert cohort.size.min() >= 40 and cohort.size.max() <= 60
    count = cohort.planted.sum(axis=1)
    np.testing.assert_array_equal(count, np.maximum(5, np.round(0.2 * cohort.size)))
    signal = np.array([cohort.patches[i][p][:, :64].mean() for i, p in enumerate(cohort.planted)])
    # The mean of |N(0, 1)| is sqrt(2 / pi).
    np.testing.assert_allclose(signal, np.sqrt(2 / np.pi) + 1 + 0.35 * cohort.z, atol=0.15)
    genes = cohort.genes.reshape(160, 6, 8)
    link = np.array([[abs(np.corrcoef(cohort.z, genes[:, g, f])[0, 1]) for f in range(8)] for g in range(6)])
    assert link[:2].min() > 0.8 and link[2:].max() < 0.4
    np.testing.assert_allclose(genes[: exp.TRAIN].std(0), 1.0, rtol=1e-4)


def test_measures_of_a_perfect_and_of_a_useless_prediction():
    cohort = exp.simulate(0).rows(np.arange(exp.TRAIN, exp.TRAIN + exp.TEST))
    genes = cohort.genes.reshape(-1, 6, 8)
    q = [np.tile(p[:n] / p.sum(), (6, 1)) for p, n in zip(cohort.planted, cohort.size)]
    noise = np.random.default_rng(0).normal(size=genes.shape)
    found = exp.measure(cohort, cohort.z, np.where(np.arange(6)[None, :, None] < 2, genes, noise), q)
    assert found["c_index"] == found["c_index_of_z"] == pytest.approx(exp.REFERENCE_C, abs=0.01)
    np.testing.assert_allclose(found["q_mass"], 1.0)
    for name in ("cosines", "cosines_pooled"):
        np.testing.assert_allclose(found[name][:2], 1.0, atol=1e-6)
        assert exp.accepted(found, name)
    assert not exp.accepted(exp.measure(cohort, cohort.z, noise, q))


def tiny(n=24, feat=12, length=9):
    """A cohort of the same form with narrow patches."""
    rng = np.random.default_rng(3)
    size = rng.integers(5, length + 1, n)
    planted = np.zeros((n, length), bool)
    planted[:, 0] = True
    z = rng.normal(size=n)
    patches = rng.normal(size=(n, length, feat)).astype(np.float32) + planted[..., None] * z[:, None, None]
    genes = rng.normal(size=(n, 6)).astype(np.float32)
    event = rng.random(n) < 0.7
    return exp.Cohort(patches.astype(np.float32), size, planted, genes, np.arange(n) % 4, np.ones(n), event, z)


def from_peer(net, groups):
    """Parameters of the PyTorch peer as ours, by way of the authors' names."""
    own, state = {k: v.detach().numpy().copy() for k, v in net.state_dict().items()}, {}
    state["recon_net.tokens"] = own.pop("tokens")[None]
    for key, value in own.items():
        layer, _, kind = key.rpartition(".")
        if layer.startswith("heads."):
            _, number, part = layer.split(".")
            state[f"recon_net.sig_reconstruct_net.{number}.{HEAD[part]}.{kind}"] = value
        else:
            state[f"{NAMES[layer]}.{kind}"] = value
    return jax.tree.map(jnp.asarray, torch_keys.from_torch(state, groups))


@pytest.mark.torch
def test_C27_training_follows_the_pytorch_network_step_by_step(monkeypatch):
    """From the same start, in the same order, without dropout: the same predictions after ten steps of Adam."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_ghanet

    for name, value in {"WIDTH": 16, "HALF": 8, "RATE": 0.0}.items():
        monkeypatch.setattr(torch_ghanet, name, value)
    groups, window, epochs, train, cohort = (3, 3), 4, 2, 20, tiny()
    torch.manual_seed(1)
    net = torch_ghanet.GHanet(12, groups)
    start = from_peer(net, groups)
    risk, parts, q = torch_ghanet.fit_and_predict(cohort, train, groups, window, epochs, 5, net)
    config = default_config()
    config.update_from_flattened_dict(dict(FAITHFUL))
    narrow = {"dim": 16, "heads": 4, "head_dim": 4, "ffn_mult": 4, "tokens": 2, "dropout": 0.0}
    config.update_from_flattened_dict({f"model.{key}": value for key, value in narrow.items()})
    config.update_from_flattened_dict({"data.feat_dim": 12, "train.b": window, "data.pool": "segment"})
    run = make_run(config, DataSpec(12, 4, sum(groups), "survival", groups))
    # A copy: fitting donates what it begins with.
    copied = jax.tree.map(jnp.copy, start)
    trained = exp.fit(run, cohort.rows(np.arange(train)), 5, epochs, 2e-4, copied, window)
    ours = exp.predict(run, trained, cohort.rows(np.arange(train, 24)))
    before = exp.predict(run, start, cohort.rows(np.arange(train, 24)))
    np.testing.assert_allclose(ours[0], risk, rtol=1e-4)
    np.testing.assert_allclose(ours[1], parts, atol=1e-3)
    for mine, other in zip(ours[2], q):
        np.testing.assert_allclose(mine, other, atol=1e-3)
    assert np.abs(before[0] - risk).max() > 1e-2, "training must have moved the risk for this check"


@pytest.mark.long
def test_C27_risk_map_and_noise_groups_meet_the_check():
    """The full network on one planted cohort; the two signal groups do not reach a cosine of 0.3: see the module."""
    found = exp.experiment(0, vectors="signs", cohort_seed=0)
    assert found["c_index"] >= exp.ACCEPT["c_index"]
    assert min(found["q_mass"]) >= exp.ACCEPT["q_mass"]
    for name in ("cosines", "cosines_pooled"):
        assert np.abs(found[name][2:]).max() <= exp.ACCEPT["noise"], name
