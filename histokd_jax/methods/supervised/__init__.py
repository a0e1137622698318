"""Supervised baselines: one network, one label or survival time, no distillation."""
