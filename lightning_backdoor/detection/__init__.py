"""From measured values to a verdict: subpopulations, gates, cuts. Tensors alone; no trainer."""
