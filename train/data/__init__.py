"""Preparing training data, and opening it by name: `pmf data prepare`, `pmf data verify`, `--data`."""
