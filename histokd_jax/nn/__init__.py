"""Flax Linen layers shared by the methods."""
