"""Schemes, training steps and comparisons that are measured, and their pictures."""
