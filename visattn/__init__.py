"""Attention blocks, backbones and segmentation networks for medical images.

Importing the package is cheap: what needs torch is imported when it is first used. With it, timm's registry holds our
backbones under names that begin with `va_`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visattn._timm import register

__version__ = "0.1.0.dev0"
NOTICE = "Research software: not a medical device, not for diagnosis or treatment."

if TYPE_CHECKING:
    from visattn.hub import from_pretrained, save_pretrained
    from visattn.inflation import inflate
    from visattn.networks import create_model
    from visattn.predictor import Predictor, load
    from visattn.weights import load_official

_LAZY = {
    "create_model": "visattn.networks",
    "from_pretrained": "visattn.hub",
    "inflate": "visattn.inflation",
    "load_official": "visattn.weights",
    "load": "visattn.predictor",
    "Predictor": "visattn.predictor",
    "save_pretrained": "visattn.hub",
}

__all__ = [
    "NOTICE",
    "Predictor",
    "__version__",
    "create_model",
    "from_pretrained",
    "inflate",
    "load",
    "load_official",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'visattn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
