"""Without a GPU the kernels run in Triton's interpreter; allocations hold NaN until they are written."""

import pytest
import torch

from tests.interpreter import interpret

if not torch.cuda.is_available():
    interpret()


@pytest.fixture(scope="session", autouse=True)
def poisoned_allocations():
    """torch.empty and its kin return NaN, in fixtures too: a value that a kernel forgets to write shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
