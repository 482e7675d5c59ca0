"""``python -m loop_lens.experiments NAME``."""

from __future__ import annotations

import typer

from loop_lens.experiments import dynamics, stages
from loop_lens.experiments.ablation import command as ablation
from loop_lens.experiments.random_init import command as random_init

COMMANDS = {
    "ablation": ablation.main,
    "dynamics": dynamics.main,
    "random-init": random_init.main,
    "stages": stages.main,
}


def build() -> typer.Typer:
    """The command line, with a command for each experiment."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, help="Experiments on looped models.")
    for name, main in COMMANDS.items():
        app.command(name)(main)
    return app


if __name__ == "__main__":
    build()()
