"""The commands, one file each: they refuse what cannot run, then import what is heavy and work.

Left out: options, help and exit codes (`cli.py`).
"""
