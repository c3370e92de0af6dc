"""One command of the command line in each file: its arguments, and a call of the one function that does the work.

A file has `add(commands)`, which registers a parser whose default `call(options, rest) -> exit code` imports what it
needs when it runs. Nothing heavy is imported here, so that `visattn --help` is quick.
"""

from visattn.commands import (
    compare,
    convert,
    doctor,
    evaluate,
    export_weights,
    gna,
    init,
    models,
    phantom,
    predict,
    recipes,
    stages,
)

COMMANDS = (stages, predict, evaluate, compare, doctor, init, recipes, models, export_weights, convert, phantom, gna)
"""In the order of `visattn --help`."""
