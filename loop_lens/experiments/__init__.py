"""Experiments that re-run published findings: ``python -m loop_lens.experiments NAME``.

Every module of `loop_lens.experiments.commands` is a command of its own name; its ``main`` is a typer function.
"""
