"""Measure, judge and align the safety ethics of vision-language models.

The names of ``__all__`` are the public Python interface. Importing the package imports neither torch nor Lightning;
each name imports what it needs when it is used for the first time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safervlm import legacy, plugins

if TYPE_CHECKING:
    from safervlm.api import ResponseJudge as Judge
    from safervlm.api import gap_figure as plot_gap
    from safervlm.api import load_vlm
    from safervlm.results.runs import load_run
    from safervlm.results.scores import compare, scores

__version__ = "0.1.0"
__all__ = ["Judge", "compare", "load_run", "load_vlm", "plot_gap", "scores"]

# Public name -> module, and the name in it.
_PLACES = {
    "Judge": ("safervlm.api", "ResponseJudge"),
    "compare": ("safervlm.results.scores", "compare"),
    "load_run": ("safervlm.results.runs", "load_run"),
    "load_vlm": ("safervlm.api", "load_vlm"),
    "plot_gap": ("safervlm.api", "gap_figure"),
    "scores": ("safervlm.results.scores", "scores"),
}

legacy.install_old_names()
plugins.install_callbacks()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
