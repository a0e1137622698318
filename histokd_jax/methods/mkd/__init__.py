"""MKD: multi-modal knowledge decomposition with online distillation (Zhang et al., MICCAI 2025)."""
