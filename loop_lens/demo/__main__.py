"""``python -m loop_lens.demo``, see `loop_lens.demo.hops`."""

import typer

from loop_lens.demo.hops import main

typer.run(main)
