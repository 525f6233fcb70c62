"""Post-training: `pmf posttrain` matches the features of a generator's images with those of real ones."""
