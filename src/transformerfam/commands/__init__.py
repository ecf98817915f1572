"""The commands of `fam`: every module here whose name has no leading underscore is one.

A command module has three names: `HELP`, one line; `add_arguments(parser)`; and `run(args)`, which
returns the exit code. It imports torch and transformers inside `run` only, so that `fam --help` is
quick, and it raises `UserError` for what the user got wrong.
"""
