"""The benchmark suite: `python -m benchmarks.suite`; see benchmarks/README.md."""
