"""What is written for readers: pictures, pages, tables, and a trained model's card.

Left out: the numbers themselves (`evaluation/`, `training/`).
"""
