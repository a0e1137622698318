"""Bag networks (multiple-instance learning) beside those of MKD, on packed bags."""
