"""Triton kernels of pMF, one file per op family; used through `pmf.ops`."""

if __name__ != "pmf.kernels":
    raise ImportError(f"import these kernels as pmf.kernels (from an installed pixel-meanflow), not as {__name__}")
