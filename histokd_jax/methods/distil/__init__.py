"""Distillation with named terms: from any network that reads genes to any that reads slides, survival or classes."""
