"""Experiments that re-run published findings: ``python -m loop_lens.experiments NAME``.

``report`` writes pages, ``claims`` judges what a paper says, ``grid_run`` measures a grid of models, and ``inputs``
opens the models and prompts that a command line names. Each experiment has a folder, and each module of
`loop_lens.experiments.commands` is a command of its own name whose ``main`` is a typer function.
"""
