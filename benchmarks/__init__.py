"""Benchmarks of this package, and the implementations that it is compared with."""
