"""Backbones as folders in Hugging Face's layout: `config.json`, `model.safetensors`, `README.md`.

timm reads and writes the first two; so a folder of ours is also `timm.create_model("local-dir:FOLDER",
pretrained=True)`, and what timm has written is read here. Nothing is downloaded or uploaded.
"""

from pathlib import Path
from typing import Any

from torch import nn

from visattn import NOTICE
from visattn.errors import UserError
from visattn.files import write_text_atomic

_CARD = """\
---
library_name: timm
license: {licence}
tags: [visattn, timm, {task}]
---
# {name}

A backbone of visattn: {parameters:,} parameters, {classes} classes, {channels} input channels.

```python
import timm, visattn

model = timm.create_model("local-dir:FOLDER", pretrained=True)
```

{notes}{notice}
"""


def save_pretrained(model: nn.Module, folder: str | Path, *, licence: str, notes: str = "") -> None:
    """Write a model of `timm.create_model` with its weights, configuration and card.

    Args:
        model: A backbone, ours or timm's, whole (not `features_only`).
        folder: Made if it is not there; must be empty.
        licence: Of the weights, as Hugging Face names it, e.g. `apache-2.0` or `other`. Weights inherit the terms of
            the data and checkpoint that they come from, so nobody but the caller knows it.
        notes: Text for the card, Markdown: data, scores, limits.

    Raises:
        UserError: The folder holds something, or the model is none of timm's factory.
    """
    from timm.models import save_for_hf

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty.\nName a new folder.")
    config: Any = getattr(model, "pretrained_cfg", None)
    if config is None or not hasattr(model, "num_classes"):
        raise UserError("save_pretrained takes a whole model of timm.create_model, not maps or other modules")
    save_for_hf(model, str(folder), safe_serialization=True)
    card = _CARD.format(
        licence=licence,
        task="image-classification",
        name=config["architecture"],
        parameters=sum(p.numel() for p in model.parameters()),
        classes=model.num_classes,
        channels=getattr(model, "in_chans", 3),
        notes=f"{notes.strip()}\n\n" if notes.strip() else "",
        notice=NOTICE,
    )
    write_text_atomic(folder / "README.md", card)


def from_pretrained(folder: str | Path, **kwargs: Any) -> nn.Module:
    """The model in a folder of `save_pretrained`, or in one that timm wrote, in eval mode.

    Args:
        folder: Holds config.json and model.safetensors.
        kwargs: Further arguments of `timm.create_model`, e.g. `features_only=True` or another `num_classes`.

    Raises:
        UserError: A file is missing; pickled weights are not read.
    """
    import timm

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: holds no {name}.\nGive a folder that visattn.save_pretrained or timm wrote.")
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)
    return model.eval()
