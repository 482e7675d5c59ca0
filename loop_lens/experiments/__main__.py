"""``python -m loop_lens.experiments``: one command for each module of `loop_lens.experiments.commands`."""

from __future__ import annotations

import importlib
import pkgutil

import typer

from loop_lens.experiments import commands


def build() -> typer.Typer:
    """The command line, with every module of the folder ``commands``."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, help="Experiments on looped models.")
    for found in sorted(pkgutil.iter_modules(commands.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{commands.__name__}.{found.name}")
        app.command(found.name.replace("_", "-"))(module.main)
    return app


if __name__ == "__main__":
    build()()
