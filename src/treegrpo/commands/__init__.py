"""The commands, one file each: a function whose signature is the command's options and whose
docstring is its help. It refuses what cannot run, then imports what is heavy and works.

Left out: the app and its exit codes (`cli.py`).
"""
