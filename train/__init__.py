"""Training pMF: command line, training loop, data preparation, evaluation."""
