"""Training: `loop.py` is the algorithm as it runs, over parts with one job each.

Left out: what is computed (`plan.py`, `rollout.py`, `advantage.py`, `objective.py` and the methods).
"""
