"""Training pMF: command line, loop, data, optimizers."""
