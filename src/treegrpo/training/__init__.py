"""Training: `loop.py` is the algorithm as it runs, over parts with one job each.

Left out: what is computed, which is the algorithm's files and the methods.
"""
