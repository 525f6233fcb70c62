"""Evaluation: FID, Inception score, precision and recall, by `pmf eval` and during training."""
