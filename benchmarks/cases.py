"""What a benchmark compares."""

from __future__ import annotations

from dataclasses import dataclass, field

from pmf.timing import Providers


@dataclass(frozen=True)
class Case:
    """One op, step, sampler or largest batch at one shape, and the providers that compute it.

    `tests` and `operations` depend on the provider: they are dicts by a word in its name, "" for any.
    """

    name: str
    providers: Providers
    tests: dict[str, str]
    """The test files that must pass before a figure is recorded."""
    bytes: int = 0
    """Bytes moved at the least."""
    operations: dict[str, int] = field(default_factory=dict)
    """Multiplications and additions of its matrix products; of several words that fit the last counts."""

    def tests_of(self, provider: str) -> set[str]:
        """The test files that stand before a provider."""
        return {test for word, test in self.tests.items() if word in provider}

    def operations_of(self, provider: str) -> int:
        """The operations that a provider is rated by."""
        return [0, *(count for word, count in self.operations.items() if word in provider)][-1]
