"""MaxViT and HaloNet against timm's own networks, with our weights."""

import timm
from torch import nn

from visattn.backbones import FAMILIES

TWINS = ("maxvit_tiny_tf_224", "maxvit_tiny_rw_256", "maxvit_rmlp_pico_rw_256", "halonet50ts", "halonet26t")


def official(name: str, model: nn.Module) -> nn.Module:
    """Timm's network with the weights of `model`."""
    network = timm.create_model(name, drop_path_rate=0.0)
    key = FAMILIES[f"va_{name}"].official_name
    network.load_state_dict({key(own): value for own, value in model.state_dict().items()})
    return network


CASES = [
    (f"va_{name}", {"drop_path_rate": 0.0}, lambda model, name=name: official(name, model), (0.95, 0.95))
    for name in TWINS
]
