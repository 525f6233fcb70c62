"""A case: one thing to measure, and the providers that compute it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pmf.timing import Providers


@dataclass(frozen=True)
class Case:
    """One op, step, sampler or largest batch at one shape.

    The keys of `tests` and `operations` are words in a provider's name; "" matches every provider.
    """

    name: str
    providers: Providers
    tests: dict[str, str]
    """The test files that must pass before a figure is recorded."""
    bytes: int = 0
    """The fewest bytes that must move."""
    operations: dict[str, int] = field(default_factory=dict)
    """Multiplications and additions of the matrix products; the last matching key counts."""

    def tests_of(self, provider: str) -> set[str]:
        """The test files that must pass before a provider is recorded."""
        return {test for word, test in self.tests.items() if word in provider}

    def operations_of(self, provider: str) -> int:
        """The operations that a provider's rate is computed from."""
        return [0, *(count for word, count in self.operations.items() if word in provider)][-1]
