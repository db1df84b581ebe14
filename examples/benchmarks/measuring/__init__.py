"""How speed, memory and operations are measured: side by side, in one process, as ratios.

`speed.py`, `growth.py` and `gpu.py` are the commands; what they have in common is here.
"""
