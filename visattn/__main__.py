"""`python -m visattn` is the `visattn` command."""

from visattn.cli import run

run()
