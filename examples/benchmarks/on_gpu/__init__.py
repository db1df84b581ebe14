"""The parts of `gpu.py`: cases, each a check or a measurement, that one process after another works off."""
