"""Whole-slide images: reading, tissue segmentation and tiling."""
