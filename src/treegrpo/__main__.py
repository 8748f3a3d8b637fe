"""`python -m treegrpo` is the command line.

Left out: the commands (`cli.py`).
"""

from treegrpo.cli import main

main()
