"""From tiles of slides to a data set of patch embeddings."""
