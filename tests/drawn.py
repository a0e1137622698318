"""Parameters drawn by NumPy, for tests to which the initialisation does not matter: nothing has to be compiled."""

import jax
import jax.numpy as jnp
import numpy as np


def variables(init, *args, seed=0):
    """Random arrays in the shapes that `init(*args)` gives: kernels by fan-in, scales and variances around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.normal(size=leaf.shape)
        if str(getattr(path[-1], "key", "")) in ("scale", "var"):
            return jnp.asarray(1 + 0.1 * np.tanh(x), leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(x / np.sqrt(fan_in), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, *args))
