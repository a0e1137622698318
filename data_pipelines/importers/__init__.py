"""Feature folders of other tools become a dataset: one module per layout, detection, planning and the import."""
