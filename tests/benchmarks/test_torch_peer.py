"""The PyTorch peer of `bench_step` computes the same student: forward pass, loss, gradients and one optimizer step."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import torch_peer  # noqa: E402
from histokd_jax.methods.mkd import torch_keys  # noqa: E402
from histokd_jax.methods.mkd.config import default_config  # noqa: E402
from histokd_jax.methods.mkd.method import make_method  # noqa: E402
from histokd_jax.train import optim, state, step  # noqa: E402
from histokd_jax.types import DataSpec  # noqa: E402

pytestmark = pytest.mark.torch

FEAT, WIDTH, HIDDEN, CLASSES = 24, 16, 8, 3
SIZES = (5, 1, 17, 9)
LR, DECAY = 1e-2, 1e-1


@pytest.fixture(scope="module")
def method():
    config = default_config()
    weights = {f"loss.lambda_{name}": 0.0 for name in ("coral", "or", "skd", "clod")}
    config.update_from_flattened_dict({"teachers": (), "data.feat_dim": FEAT, "model.d": WIDTH, **weights})
    config.update_from_flattened_dict({"model.attn": HIDDEN, "model.dropout": 0.0, "data.chunk": 8})
    return make_method(config, DataSpec(FEAT, CLASSES))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    rows, length, total = 5, 8, sum(SIZES)
    patches = np.zeros((rows * length, FEAT), np.float32)
    patches[:total] = rng.standard_normal((total, FEAT))
    ids, positions = np.zeros((2, rows * length), np.int32)
    ids[:total] = np.repeat(np.arange(1, len(SIZES) + 1), SIZES)
    positions[:total] = np.concatenate([np.arange(n) for n in SIZES])
    return {
        "patches": patches.reshape(rows, length, FEAT),
        "segment_ids": ids.reshape(rows, length),
        "positions": positions.reshape(rows, length),
        "weight": np.ones(len(SIZES), np.float32),
        "slide_index": np.arange(len(SIZES), dtype=np.int32),
        "label": np.array([0, 2, 1, 2], np.int32),
        "genes": np.zeros((len(SIZES), 512), np.float32),
    }


@pytest.fixture(scope="module")
def params(method):
    return method.init(jax.random.key(0))[0]


@pytest.fixture
def peer(params):
    module = torch_peer.StudentPeer(FEAT, WIDTH, HIDDEN, CLASSES, rate=0.0)
    module.load(torch_keys.to_torch(params["S_P"], "S_P"))
    return module


def test_bags_of_cuts_the_packed_stream_into_slides(batch):
    bags = torch_peer.bags_of(batch)
    assert [len(patches) for patches, _ in bags] == list(SIZES)
    assert [int(label) for _, label in bags] == batch["label"].tolist()
    stream = batch["patches"].reshape(-1, FEAT)
    np.testing.assert_array_equal(bags[2][0].numpy(), stream[6:23])
    assert np.shares_memory(bags[2][0].numpy(), batch["patches"])


def test_peer_gives_the_logits_of_the_student(method, params, peer, batch):
    outputs, _ = method.forward(params, {}, {}, batch, None, False, stage="online")
    peer.eval()
    with torch.no_grad():
        logits = torch.cat([peer(patches) for patches, _ in torch_peer.bags_of(batch)]).numpy()
    np.testing.assert_allclose(logits, outputs["z_P"], rtol=1e-5, atol=1e-5)


def test_peer_gives_loss_and_gradients_of_the_student(method, params, peer, batch):
    loss, _, _, grads = step.loss_and_gradients(
        method, "online", params, {}, batch, jax.random.key(1), jnp.zeros((), jnp.int32)
    )
    peer_loss = torch_peer.accumulate(peer, torch_peer.bags_of(batch))
    np.testing.assert_allclose(peer_loss, loss, rtol=1e-5)
    expected = torch_keys.to_torch(grads["S_P"], "S_P")
    found = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), 1e-3)
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


def test_peer_takes_the_same_optimizer_steps(method, params, peer, batch):
    tx = optim.make_optimizer(weight_decay=DECAY, decay_bias=True, trainable=("S_P",), groups=("S_P",))
    names = step.metric_names(method, "online", params, {}, batch)
    ours = state.start_stage(params, {}, jax.random.key(2), tx, names)
    train = jax.jit(step.make_train_step(method, tx, "online"))
    torch_step = torch_peer.make_step(peer, peer, lr=LR, weight_decay=DECAY)
    for _ in range(3):
        ours, loss = train(ours, batch, jnp.float32(LR))
        np.testing.assert_allclose(torch_step(torch_peer.bags_of(batch)), loss, rtol=1e-4)
    expected = torch_keys.to_torch(ours.params["S_P"], "S_P")
    for name, parameter in peer.named_parameters():
        if name == "attention.attention_weights.bias":
            continue  # its gradient is zero up to rounding, which AdamW turns into steps of random sign
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_peer_drops_units_in_front_of_the_classifier_in_training_only(batch):
    module = torch_peer.StudentPeer(FEAT, WIDTH, HIDDEN, CLASSES, rate=0.5)
    patches, _ = torch_peer.bags_of(batch)[0]
    torch.manual_seed(0)
    assert not torch.equal(module(patches), module(patches))
    module.eval()
    assert torch.equal(module(patches), module(patches))


def test_peer_in_bfloat16_rounds_the_bags_and_stays_near_float32(peer, batch):
    peer.eval()
    exact, low = (torch_peer.bags_of(batch, bfloat16=flag) for flag in (False, True))
    assert {patches.dtype for patches, _ in low} == {torch.bfloat16}
    losses = [float(torch_peer.accumulate(peer, exact)), float(torch_peer.accumulate(peer, low, bfloat16=True))]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.03)
    assert {p.grad.dtype for p in peer.parameters()} == {torch.float32}


def test_peer_runs_on_the_kind_of_device_that_jax_uses():
    assert torch_peer.device_for("cpu").type == "cpu"
    with pytest.raises(ValueError, match="JAX runs on tpu, and this PyTorch build has no device of that kind"):
        torch_peer.device_for("tpu")
