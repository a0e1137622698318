"""Metrics, intervals, prediction tables and summaries in NumPy; no JAX needed to read a finished run."""
