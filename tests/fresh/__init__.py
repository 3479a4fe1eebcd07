"""The README's commands on a bare machine. Run on demand: FRESH=12,13."""
