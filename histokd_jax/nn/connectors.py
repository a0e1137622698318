"""Connectors: small trained maps that bring features of one network to the width of another's."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.nn.affine import LECUN_NORMAL, initializers

LINEAR, MLP = "linear", "mlp"
KINDS = (LINEAR, MLP)


class Connector(nn.Module):
    """Maps the channels of [b, C_in, positions ...] to `width`, position by position (a 1 x 1 convolution on maps).

    Attributes:
      width: channels out.
      kind: "linear", or "mlp": two hidden layers of `width` with ReLU between, as the regressor of VID.
      use_bias: whether the layers have biases.
    """

    width: int
    kind: str = LINEAR
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, width, positions ...] of [b, C_in, positions ...]; float32 at least."""
        x = jnp.moveaxis(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 1, -1)
        layers = 3 if self.kind == MLP else 1
        for k in range(layers):
            kernel, _ = initializers(LECUN_NORMAL, x.shape[-1])
            x = nn.Dense(self.width, use_bias=self.use_bias, kernel_init=kernel, name=f"layer_{k}")(x)
            x = nn.relu(x) if k + 1 < layers else x
        return jnp.moveaxis(x, -1, 1)
