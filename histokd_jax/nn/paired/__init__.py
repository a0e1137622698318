"""Networks for tiles in two stains: CoCoFNet, which reads both, and its student, which reads one."""
