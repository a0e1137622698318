"""One of several processes: loss and gradients of an MKD step on the devices of all; process 0 writes them."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from data_pipelines.pipeline import StepIterator
from histokd_jax.methods import registry
from histokd_jax.train import distributed, experiment, processes, sharding, step
from histokd_jax.utils import config


def loss_and_gradients(data, devices, out=None):
    """{leaf name: gradient} and "loss" of the first step of a plan with eight rows."""
    cfg = experiment.resolve_width(config.load(tiny.CONFIG, tiny.overrides(data, data__rows=8)))
    exp = experiment.load_experiment(cfg)
    method = registry.get_method("mkd")(cfg, exp.data_spec(("genes",)))
    source = experiment.fold_data(exp, 0, method).train
    mesh = sharding.make_mesh(devices)
    mine = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batch = sharding.put_batch(mesh, next(StepIterator(source, num_threads=0, **mine)))
    params, _ = jax.jit(method.init)(jax.random.key(0))
    params = sharding.put_tree(params, sharding.state_shardings(mesh, params, fsdp=False))

    def gradients(params, batch):
        key, number = jax.random.key(1), jnp.zeros((), jnp.int32)
        loss, _, _, grads = step.loss_and_gradients(method, "online", params, {}, batch, key, number)
        return loss, grads

    with jax.set_mesh(mesh):
        loss, grads = jax.jit(gradients, out_shardings=sharding.replicated(mesh))(params, batch)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(grads))
    return {"loss": np.asarray(loss), **{jax.tree_util.keystr(path): leaf for path, leaf in leaves}}


if __name__ == "__main__":
    distributed.initialize(processes.resolve(None, None, None, os.environ))
    found = loss_and_gradients(sys.argv[1], 0)
    assert distributed.gather(jax.local_device_count()) == [4, 4]
    if distributed.is_main():
        np.savez(sys.argv[2], **found)
