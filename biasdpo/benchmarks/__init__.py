"""Benchmarks: items to requests, outputs to scores. None of them knows a backend."""
