"""Experiments that re-run published findings: ``python -m loop_lens.experiments NAME``.

``report`` writes pages, ``claims`` judges what a paper says, ``grid_run`` measures a grid of models, and ``inputs``
opens the models and prompts that a command line names. Each experiment has a file or a folder, whose ``main`` is a
typer function, and beside it the template of its page.
"""
