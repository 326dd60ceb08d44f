"""whet: makes a language model measurably better at a task. The public names; heavy libraries load when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from whet import methods as methods
    from whet.scorecard import compare as compare
    from whet.scorecard import evaluate as evaluate
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
    "evaluate": "whet.scorecard",
    "compare": "whet.scorecard",
}
__all__ = ["Recipe", "System", "Task", "__version__", "compare", "evaluate", "improve", "load", "methods"]


def __getattr__(name: str) -> Any:
    """Public names are imported when first asked for, so that `import whet` costs next to nothing."""
    if name == "methods":
        return import_module("whet.methods")
    if name not in _PLACES:
        raise AttributeError(f"module 'whet' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
