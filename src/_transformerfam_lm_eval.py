"""Tells lm-evaluation-harness of `--model transformerfam` once it runs, in whatever process.

The harness knows models by a registry that `lm_eval.models` fills when it is imported; it has no entry
points. `_transformerfam_lm_eval.pth`, beside this file, imports this module whenever Python starts, and
this module does no more than wait for that import. It imports nothing, not even transformerfam, whose
class the registry loads when it is asked for.
"""

import sys

_AWAITED = "lm_eval.models"
_CLASS = "transformerfam.harness:StreamingLM"


def register() -> None:
    """Put `transformerfam` beside the models of the harness; a second time does nothing."""
    from lm_eval import models  # noqa: F401  # or a registry of ours alone would pass for filled
    from lm_eval.api.registry import model_registry

    if "transformerfam" not in model_registry:
        model_registry.register("transformerfam", target=_CLASS)


class Await:
    """A finder of modules that finds one only, and with it puts `register` behind its execution."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """None, which leaves a module to the other finders, for all but `lm_eval.models`."""
        if name != _AWAITED:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: object) -> None:
            execute(module)  # type: ignore[arg-type]
            try:
                register()
            except (ImportError, AttributeError, TypeError) as error:
                # Another release of the harness: it must work for other models all the same.
                print(f"transformerfam is not known to lm_eval: {error}", file=sys.stderr)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Await())  # type: ignore[arg-type]
