"""Distillation between survival networks: from any teacher that reads genes to any student that reads slides."""
