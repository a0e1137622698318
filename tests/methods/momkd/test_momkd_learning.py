"""Check 19: separable synthetic slides are learnt; the code of the informative patches receives the most attention."""

import jax
import jax.numpy as jnp
import momkd_setup as setup
import numpy as np
import optax

from data_pipelines.neighbours import neighbour_offsets
from histokd_jax.methods.momkd import memory
from histokd_jax.methods.momkd.config import default_config
from histokd_jax.methods.momkd.method import make_run
from histokd_jax.types import DataSpec

SLIDES, PATCHES, FEAT, GENES, INFORMATIVE = 16, 24, 32, 24, 4
SETTINGS = {
    "data.feat_dim": FEAT,
    "genes.top_k": GENES,
    "model.d": 32,
    "model.d_gene": 16,
    "model.gene_hidden": 16,
    "model.sphere": 16,
    "model.codes": 4,
}


def cohort(seed=0):
    """Four patches of every slide point where its class says, along one direction; genes say the same."""
    rng = np.random.default_rng(seed)
    label = (np.arange(SLIDES) % 2).astype(np.int32)
    sign = (2 * label - 1).astype(np.float32)
    direction, programme = (v / np.linalg.norm(v) for v in (rng.normal(size=FEAT), rng.normal(size=GENES)))
    patches = rng.normal(size=(SLIDES, PATCHES, FEAT)).astype(np.float32)
    patches[:, :INFORMATIVE] += (6 * sign[:, None, None] * direction).astype(np.float32)
    coords = [rng.permutation(400)[:PATCHES] for _ in range(SLIDES)]
    offsets = np.stack([neighbour_offsets(np.stack([c % 20, c // 20], axis=1), 8) for c in coords])
    genes = (rng.normal(size=(SLIDES, GENES)) + 10 * sign[:, None] * programme).astype(np.float32)
    ids = np.broadcast_to(np.arange(1, SLIDES + 1, dtype=np.int32)[:, None], (SLIDES, PATCHES))
    return {
        "patches": patches,
        "segment_ids": ids,
        "positions": np.broadcast_to(np.arange(PATCHES, dtype=np.int32), ids.shape),
        "neighbours": offsets,
        "genes": genes,
        "label": label,
        "slide_index": np.arange(SLIDES, dtype=np.int32),
        "weight": np.ones(SLIDES, np.float32),
    }


def test_C19_training_auc_reaches_one_and_the_code_of_informative_patches_gets_the_most_attention():
    config = default_config()
    config.update_from_flattened_dict(SETTINGS)
    run, batch = make_run(config, DataSpec(FEAT, 2, GENES)), jax.tree.map(jnp.asarray, cohort())
    params, extra = jax.jit(run.init)(jax.random.key(0))
    params, extra = run.prepare(params, extra, lambda: [batch], 0)
    tx = optax.chain(optax.clip_by_global_norm(16.0), optax.adamw(2e-3, weight_decay=1e-4))

    def step(carry, key):
        params, state = carry

        def loss(params):
            out, _ = run.forward(params, {}, extra, batch, key, True)
            return run.objective(out, batch)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(1), 120)
    (params, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, tx.init(params)))
    assert losses[-10:].mean() < 0.3 * losses[:3].mean()
    prob = np.asarray(setup.predict(run, params, extra, batch)["prob"])[:, 1]
    label = np.asarray(batch["label"])
    assert prob[label == 1].min() > prob[label == 0].max(), "training AUC 1"
    # Of every positive slide: attention summed over the patches of each code of its memory.
    attention = setup.attention(run, params, extra, batch)[label == 1]
    sphere = np.asarray(setup.details(run, params, extra, batch)["patches"].sphere).reshape(SLIDES, PATCHES, -1)
    unit = np.asarray(memory.normalise(params["MEMORY"]["codes"]))
    nearest = (sphere[label == 1] @ unit[1].T).argmax(axis=-1)
    mass = [attention[nearest == code].sum() for code in range(len(unit[1]))]
    assert int(np.argmax(mass)) == int(np.bincount(nearest[:, :INFORMATIVE].ravel(), minlength=4).argmax())
    # Informative patches lie closer to the memory of their class than to the other one.
    best = np.stack([sphere[label == 1, :INFORMATIVE] @ unit[c].T for c in (0, 1)]).max(axis=-1)
    assert (best[1] > best[0]).mean() > 0.9
