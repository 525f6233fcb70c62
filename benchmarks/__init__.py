"""Measuring pMF: what a step computes, keeps for backward, and takes."""
