"""bench_ssl at smoke size, and its PyTorch peer against the library's step."""

import json

import jax
import numpy as np
import pytest

from benchmarks import bench_ssl, common


def arguments(*given):
    return common.parser("bench_ssl", "").parse_args(["--smoke", *given])


@pytest.mark.bench
def test_smoke_measures_every_side(tmp_path):
    record = bench_ssl.run(bench_ssl.SMOKE, arguments("--out", str(tmp_path / "x.json")))
    common.check_record(json.loads((tmp_path / "x.json").read_text()))
    sides = [side for side in bench_ssl.SMOKE["sides"] if side not in record["derived"].get("not_measured", {})]
    assert set(record["metrics"]) == {f"{side}[32 px, batch 4]" for side in sides}
    assert record["derived"]["32 px, batch 4"]["augmentation_share"] < 1.0


def test_sides_are_compared_round_by_round_with_the_better_peer():
    values = {"trident": [3.0, 3.0], "trident_plain": [4.0, 6.0], "torch_eager": [1.0, 1.0], "torch_gram": [2.0, 2.0]}
    found = bench_ssl.compare(values)
    assert found == {"augmentation_share": 1 - 0.625, "better_peer": "torch_gram", "plain_over_peer": 2.5}
    assert bench_ssl.compare({"trident": [1.0]}) == {}


@pytest.mark.torch
def test_the_peer_takes_the_same_step():
    """Loss and the change of every array after one step of both, given the same weights and images."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_ssl
    from histokd_jax.methods.ssl import config as settings
    from histokd_jax.methods.ssl import method as ssl

    config = bench_ssl.SMOKE
    run, data = bench_ssl.make_method(config, bench_ssl.PLAIN, 32, 4), bench_ssl.make_batch(32, 4)
    params, extra = jax.jit(run.init)(jax.random.key(0))
    step, tx = bench_ssl.training_step(run, tuple(params))
    (after, _, _), loss = jax.jit(step)((params, extra, tx.init(params)), data, 0)
    cfg = ssl.default_config()
    cfg.update_from_flattened_dict(config["model"])
    spec, widths = settings.encoder_spec(cfg, settings.RESNET, 32), tuple(cfg.projector.widths)
    net, expected = torch_ssl.TridentPeer(spec, widths).train(), torch_ssl.TridentPeer(spec, widths)
    net.load(params)
    expected.load(after)
    image, partner = (torch.tensor(np.moveaxis(np.asarray(data[n]), -1, 1)).float() for n in ("image", "partner"))
    found = torch_ssl.make_step(net, bench_ssl.RATE)((image, image, partner), gram=False)
    assert found == pytest.approx(float(loss), rel=1e-3)
    moved = [(a - b).detach().abs() for a, b in zip(net.parameters(), expected.parameters(), strict=True)]
    # Adam's first step has the size of the rate for every number: signs of tiny gradients may differ.
    shares = torch.cat([(m.flatten() > 0.2 * bench_ssl.RATE).float() for m in moved])
    assert max(float(m.max()) for m in moved) <= 2.01 * bench_ssl.RATE and float(shares.mean()) < 0.2
