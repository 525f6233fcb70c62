"""Benchmarks: time, memory and operations of ops, training steps and sampling."""
