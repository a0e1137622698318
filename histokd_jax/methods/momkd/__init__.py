"""MoMKD: momentum-memory knowledge distillation (Guo et al., CVPR 2026)."""
