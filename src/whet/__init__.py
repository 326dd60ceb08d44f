"""whet: makes a language model measurably better at a task. The public names; heavy libraries load when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from whet.evaluate import compare as compare
    from whet.evaluate import evaluate as evaluate
    from whet.methods import methods as methods
    from whet.search import improve as improve
    from whet.search.recipe import Recipe as Recipe
    from whet.system import System as System
    from whet.system import load as load
    from whet.task import Task as Task

_PLACES = {
    "load": "whet.system",
    "System": "whet.system",
    "Task": "whet.task",
    "Recipe": "whet.search.recipe",
    "improve": "whet.search",
    "evaluate": "whet.evaluate",
    "compare": "whet.evaluate",
    "methods": "whet.methods",
}
__all__ = ["Recipe", "System", "Task", "__version__", "compare", "evaluate", "improve", "load", "methods"]


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that `import whet` costs next to nothing."""
    if name not in _PLACES:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)
