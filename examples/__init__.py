"""Scripts to run as they are, as in `python examples/quickstart.py`; `benchmarks` are modules of this package."""
