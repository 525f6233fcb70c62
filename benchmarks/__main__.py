"""`python -m pmf.benchmarks`."""

from pmf.benchmarks.cli import main

main()
