"""Temporary memory of a compiled training step of every bag network: it must not grow with the bag."""

import jax
import jax.numpy as jnp
import pytest

from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.abmil import AbmilNet
from histokd_jax.nn.mil.clam import ClamNet
from histokd_jax.nn.mil.clustered import ClusteredBags, DeepAttnMislNet
from histokd_jax.nn.mil.deepsets import DeepSetsNet
from histokd_jax.nn.mil.dsmil import DsmilNet
from histokd_jax.ops.pooling import chunked

D, WIDTH, SHORT, LONG = 128, 32, 8192, 65536
NETWORKS = {
    "deepsets": DeepSetsNet(D, 4, WIDTH),
    "abmil": AbmilNet(D, 4, WIDTH, 16),
    "deepattnmisl": DeepAttnMislNet(D, 4, 10, WIDTH, 16),
    "clam_sb": ClamNet(D, 4, False, WIDTH, 16),
    "clam_mb": ClamNet(D, 4, True, WIDTH, 16),
    "dsmil": DsmilNet(D, 4, 16),
}
# DeepAttnMISL sorts the patches by cluster, which copies them once (float16), and keeps a few integers of each.
PER_PATCH = {"deepattnmisl": 2 * D + 120}


def temporaries(name, length):
    module = NETWORKS[name]

    def bags(patches, ids, positions):
        plain = Bags(patches, ids, positions, 2)
        return ClusteredBags(*plain, clusters=positions % 10) if name == "deepattnmisl" else plain

    def loss(params, *rows):
        out = module.apply(params, bags(*rows), None, jnp.uint32(1))
        return sum(jnp.sum(v) for v in out.values())

    index = jax.ShapeDtypeStruct((1, length), jnp.int32)
    rows = (jax.ShapeDtypeStruct((1, length, D), jnp.float16), index, index)
    params = jax.eval_shape(lambda key, *rows: module.init(key, bags(*rows)), jax.random.key(0), *rows)
    return jax.jit(jax.grad(loss)).lower(params, *rows).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", NETWORKS)
def test_memory_of_a_training_step_does_not_grow_with_the_bag(name, monkeypatch):
    # Products kept for the backward pass are bounded by a constant; here by 0.
    monkeypatch.setattr(chunked, "SAVE_BYTES", 0)
    growth = (temporaries(name, LONG) - temporaries(name, SHORT)) / (LONG - SHORT)
    assert growth <= PER_PATCH.get(name, 24), f"{growth:.1f} bytes per patch of {2 * D}"
