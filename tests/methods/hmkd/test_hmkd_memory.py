"""Memory of a step of the first stage at full size, from the compiled program; nothing is run."""

import jax
import jax.numpy as jnp
import optax
import paired_setup as setup
import pytest

from histokd_jax.methods.hmkd import method as hmkd
from histokd_jax.types import DataSpec

BATCH, SIDE = 16, 1024


def compiled_step(**changes):
    cfg = hmkd.default_config()
    cfg.update_from_flattened_dict(changes)
    run = hmkd.make_method(cfg, DataSpec(feat_dim=0, num_classes=4, image_size=(SIDE, SIDE)))
    params, extra = jax.eval_shape(run.init, jax.random.key(0))
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.trace(0.9))
    state = params["teacher"], extra["teacher"], jax.eval_shape(tx.init, params["teacher"])
    image = jax.ShapeDtypeStruct((BATCH, SIDE, SIDE, 3), jnp.uint8)
    flag = jax.ShapeDtypeStruct((BATCH,), bool)
    number = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    batch = {"image": image, "partner": image, "has_partner": flag, "has_label": flag, "label": number}
    batch |= {"example": number, "weight": jax.ShapeDtypeStruct((BATCH,), jnp.float32)}

    def step(state, batch, seed):
        teacher, stats, opt_state = state

        def loss(teacher):
            own = {"teacher": teacher}, {}, {"teacher": stats}
            outputs, new = run.forward(*own, batch, jax.random.key(seed), True, stage="teacher")
            return run.objective(outputs, batch, 0, "teacher")[0], new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(teacher)
        updates, opt_state = tx.update(grads, opt_state, teacher)
        teacher = jax.tree.map(lambda p, u: p - 1e-3 * u, teacher, updates)
        return (teacher, new["teacher"], opt_state), value

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return jax.jit(step, donate_argnums=0).lower(state, batch, seed).compile(setup.QUICK)


@pytest.mark.long
def test_a_step_of_16_pairs_of_1024_pixels_needs_at_most_12_gib_of_temporaries():
    memory = compiled_step().memory_analysis()
    temporaries = memory.temp_size_in_bytes / 2**30
    assert temporaries <= 12.0, f"{temporaries:.2f} GiB"
    assert temporaries > 0.5, "the estimate must see the activations"
