"""Labelled patches for the evaluation of encoders: readers of folders, arrays and pair sets, and their split."""
