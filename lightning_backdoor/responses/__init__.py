"""What is done about a verdict: restart, reset units, unlearn, train in two stages."""
