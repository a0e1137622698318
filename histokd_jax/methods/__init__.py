"""Learning systems, one package each; `registry` finds them by name."""
