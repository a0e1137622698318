"""Fixtures of the tests that start several processes."""

from tiny import cohort_dir, tiny_config

__all__ = ["cohort_dir", "tiny_config"]
