"""Data on disk, tables, splits, packing and the Grain input pipeline (NumPy only; no JAX backend is touched)."""
