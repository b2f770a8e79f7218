"""From measured values to a verdict: subpopulations, gates, cuts. Functions on tensors; no trainer."""
