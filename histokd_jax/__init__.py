"""histokd_jax: multi-modal knowledge distillation for histopathology in JAX/Flax."""

__version__ = "0.1.0"
