"""Allocations hold NaN until they are written, in tests and in fixtures of any scope."""

import pytest
import torch


@pytest.fixture(scope="module")
def allocated_by_a_fixture():
    return torch.empty(3)


def test_allocations_are_poisoned(allocated_by_a_fixture):
    assert allocated_by_a_fixture.isnan().all()
    assert torch.empty(3).isnan().all()
