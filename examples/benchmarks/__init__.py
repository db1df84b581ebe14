"""Measurements, to run from the root of a checkout: `python -m examples.benchmarks.compare`, and so on.

They are modules, not scripts, because they share code with each other and with the examples (`data_and_backbone.py`).
"""
