"""Triton kernels of pMF, one file per op family; used through `pmf.ops`."""

if __name__ != "pmf.kernels":
    # Hugging Face's libraries look for a package of this name: where they find this folder, they must find it empty.
    __path__ = []

    def __getattr__(name: str):
        raise AttributeError(
            f"import these kernels as pmf.kernels (from an installed pixel-meanflow), not as {__name__}"
        )
