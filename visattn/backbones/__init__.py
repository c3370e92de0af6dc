"""Backbones, one family per file; importing this package registers them with timm.

`FAMILIES` maps each registered name to its family's module. A family that has official weights holds two functions
there, `official_name` and `unused`, and may hold a third, `translate`; `visattn.weights` says what they do.
"""

from types import ModuleType

from visattn.backbones import (
    agent_cswin,
    agent_deit,
    agent_pvt,
    agent_swin,
    biformer,
    biformer_stl,
    dinat_s,
    halonet,
    maxvit,
    medvit,
    medvit_dina,
    mobilenetv2_ela,
    nat,
    partialnet,
    pyramid,
    resnet_ela,
)

_MODULES: tuple[ModuleType, ...] = (
    pyramid,
    biformer,
    biformer_stl,
    medvit,
    medvit_dina,
    nat,
    dinat_s,
    agent_deit,
    agent_pvt,
    agent_swin,
    agent_cswin,
    partialnet,
    maxvit,
    halonet,
    mobilenetv2_ela,
    resnet_ela,
)
FAMILIES: dict[str, ModuleType] = {name: module for module in _MODULES for name in module.default_cfgs}
"""Registered names and the modules that hold them."""

__all__ = ["FAMILIES"]
