"""The demos: images that ship inside installed packages, and scores of networks trained on them."""

from pmf.train.demo.image_sets import digits, photographs

__all__ = ["digits", "photographs"]
