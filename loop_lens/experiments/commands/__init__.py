"""The commands: each module here has a typer function ``main``."""
