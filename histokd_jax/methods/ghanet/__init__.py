"""G-HANet: survival from slides with genomics as a reconstruction target (Wang et al., IEEE TMI 2025)."""
