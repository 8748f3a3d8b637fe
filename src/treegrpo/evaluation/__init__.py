"""Measuring a model by rewards: sampling, the scores of what was sampled, and their figures.

Left out: what shows the figures (`report/`) and the command (`commands/evaluate.py`).
"""
