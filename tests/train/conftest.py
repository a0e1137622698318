"""Fixtures of the trainer's tests."""

from tiny import cohort_dir, tiny_config

__all__ = ["cohort_dir", "tiny_config"]
