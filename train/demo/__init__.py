"""The demos: images that ship inside packages, and scores of the networks that learn them."""

from pmf.train.demo.image_sets import digits, photographs

__all__ = ["digits", "photographs"]
