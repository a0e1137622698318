"""Evaluation of patch encoders: frozen features, small probes on few labels, fine-tuning, maps and clusters."""
