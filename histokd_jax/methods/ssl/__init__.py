"""Self-supervised pre-training against a privileged view: More From Less and TriDeNT."""
