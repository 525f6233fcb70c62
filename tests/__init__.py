# A package, so that no installed package called tests (torch-fidelity brings one) is imported in its place.
