"""Checks of a dataset together with its tables and splits, before anything is trained on them."""
