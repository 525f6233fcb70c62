"""Measuring networks: FID, Inception score, precision and recall, by `pmf eval` and while a run trains."""
