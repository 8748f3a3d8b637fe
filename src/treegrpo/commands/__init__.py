"""The commands, a function in a file each: its signature is the options, its docstring the help.

It refuses what cannot run, then imports what is heavy and works.

Left out: the app and its exit codes (`cli.py`).
"""
