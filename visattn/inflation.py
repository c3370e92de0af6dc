"""Weights of a network for images, taken over by the same network for volumes.

A kernel is repeated along depth and divided by the number of its repetitions, as Carreira and Zisserman inflate (I3D,
CVPR 2017, arXiv 1705.07750); a transposed one by how many of them meet in a voxel. A volume whose slices are all alike
then gives, away from its ends, what the image gives. The other habit, to put the kernel into the middle and zeros
around it, keeps slices apart and leaves out those that a stride steps over; here every one is seen from the start.
Biases by relative position are the same for all offsets along depth.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from visattn.attention._relative import RelativePositionMlp, RelativePositionTable
from visattn.attention.neighborhood import NeighborhoodAttention
from visattn.errors import UserError

Rule = Callable[[Tensor, torch.Size], Tensor | None]
"""The entry of a volume's network from that of an image's, and the shape that it must have; None: no way is known."""

_DEPTH = "depth_rel"  # halo attention's table of offsets along depth


def inflate(state_dict: Mapping[str, Tensor], model: nn.Module) -> None:
    """Fill a network for volumes with the weights of the same network for images.

    Linear layers, norms, and whatever has one shape in both, are copied. Convolutions over several channels become one
    over a single channel by their sum. All or nothing: where one entry does not fit, the network stays as it is.

    Args:
        state_dict: Of the network for images.
        model: The network for volumes, built with the same arguments but for its axes and channels.

    Raises:
        UserError: Entries are missing or too many, or one has no counterpart in three dimensions.
    """
    own = model.state_dict()
    rules = _rules(model)
    extra = [key for key in state_dict if key not in own]
    missing = [key for key in own if key not in state_dict and not key.endswith(_DEPTH)]
    for keys, what in ((missing, "no entry for"), (extra, "an entry that the network for volumes has not:")):
        if keys:
            raise UserError(
                f"inflate: the state dict has {what} {keys[0]} ({len(keys)} such).\n"
                "Build both networks with the same arguments."
            )
    filled: dict[str, Tensor] = {}
    for key, value in own.items():
        given = state_dict.get(key)
        if given is None:  # offsets along depth, which an image does not have: they count for nothing
            filled[key] = torch.zeros_like(value)
            continue
        rule = rules.get(key)
        found: Tensor | None = given if given.shape == value.shape else None
        if found is None and rule is not None:
            found = rule(given, value.shape)
        if found is None or found.shape != value.shape:
            raise UserError(
                f"inflate: {key} is {tuple(given.shape)} for images and {tuple(value.shape)} for volumes, and there is "
                "no rule that leads from one to the other."
            )
        filled[key] = found
    model.load_state_dict(filled)


def _rules(model: nn.Module) -> dict[str, Rule]:
    """For the entries that change their shape, what to do with them."""
    rules: dict[str, Rule] = {}
    for name, module in model.named_modules():
        lead = f"{name}." if name else ""
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            rules[f"{lead}weight"] = _kernel(module)
        elif isinstance(module, NeighborhoodAttention):
            rules[f"{lead}rpb"] = _grid
        elif isinstance(module, RelativePositionTable):
            rules[f"{lead}relative_position_bias_table"] = _grid if module.layout == "grid" else _flat
        elif isinstance(module, RelativePositionMlp):
            rules[f"{lead}mlp.fc1.weight"] = _column
    return rules


def _kernel(conv: nn.Conv3d | nn.ConvTranspose3d) -> Rule:
    size, stride = conv.kernel_size[0], conv.stride[0]
    share = size / stride if isinstance(conv, nn.ConvTranspose3d) else size

    def rule(given: Tensor, shape: torch.Size) -> Tensor | None:
        if given.ndim != 4:
            return None
        if given.shape[1] != shape[1] == 1:
            given = given.sum(1, keepdim=True)
        return given.unsqueeze(2).repeat(1, 1, size, 1, 1) / share

    return rule


def _grid(given: Tensor, shape: torch.Size) -> Tensor | None:
    """(h, 2P - 1, 2P - 1) to (h, 2P - 1, 2P - 1, 2P - 1)."""
    return given.unsqueeze(1).repeat(1, shape[1], 1, 1) if given.ndim == 3 else None


def _flat(given: Tensor, shape: torch.Size) -> Tensor | None:
    """((2P - 1)^2, h) to ((2P - 1)^3, h), the offset along depth changing slowest."""
    return given.repeat(shape[0] // len(given), 1) if given.ndim == 2 and not shape[0] % len(given) else None


def _column(given: Tensor, shape: torch.Size) -> Tensor | None:
    """(hidden, 2) to (hidden, 3): the offset along depth comes first and counts for nothing."""
    return torch.cat([torch.zeros_like(given[:, :1]), given], dim=1)
