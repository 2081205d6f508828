"""Rejection sampling: `run` samples and scores, `harvest` picks, writes and draws."""
