"""`treegrpo cache`: what is kept of prompt embeddings, and getting rid of it.

Left out: the limit above which the oldest are dropped (`model.embedding_cache_gib`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from treegrpo.console import plain_console
from treegrpo.models import cache as folder


def cache(
    where: Annotated[
        str,
        typer.Option(
            "--folder", metavar="FOLDER", help="As model.embedding_cache; auto: the user's own."
        ),
    ] = "auto",
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
) -> None:
    """Show the kept prompt embeddings by model, or delete them."""
    path, console = folder.cache_folder(where), plain_console()
    models = folder.kept(path)
    prompts, size = sum(one.prompts for one in models), sum(one.bytes for one in models)
    total = f"{prompts:,} prompts, {size / 2**20:,.1f} MiB in {path}"
    if clear:
        folder.clear(path)
        console.print(f"deleted {total}", soft_wrap=True)
        return
    if models:
        table = Table("model", "last used")
        for name in ("prompts", "MiB"):
            table.add_column(name, justify="right")
        for one in models:
            used = datetime.fromtimestamp(one.used).strftime("%Y-%m-%d %H:%M")
            table.add_row(one.model or "?", used, f"{one.prompts:,}", f"{one.bytes / 2**20:,.1f}")
        console.print(table)
    console.print(total, soft_wrap=True)
