"""The miniature: a tiny model that ships with the package, its world and how it was made.

Left out: its reward (`rewards/composition.py`).
"""
