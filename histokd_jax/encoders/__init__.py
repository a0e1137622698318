"""Patch encoders: published architectures with their input conventions, weights from files, and folders of our own."""
