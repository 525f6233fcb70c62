# This is a package so that an installed package called tests (torch-fidelity ships one) is not imported instead.
