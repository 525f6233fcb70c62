"""`python -m pmf.train`."""

from pmf.train.cli import main

main()
