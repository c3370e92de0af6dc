"""The authors' weights of AGUNet and DAUNet: Keras's layer names, which count the layers as they are created.

Official code: github.com/dbouget/mri_brain_tumor_segmentation, revision 7af4e77 (see `visattn.networks.agunet`).
"""

import warnings
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

from torch import Tensor, nn

from visattn.attention import ChannelAttention, PositionAttention
from visattn.networks.agunet import AttentionUNet, DualAttention, GatedLevel, GuidedLevel
from visattn.weights import load_renamed


def from_official(name: str, state_dict: Mapping[str, Tensor], **kwargs: Any) -> AttentionUNet:
    """AGUNet or DAUNet with the authors' weights; every entry must match, by name and shape.

    Args:
        name: `agunet` or `daunet`.
        state_dict: Keras layer names and weights, `conv3d_4.kernel`; kernels in torch's layout, (out, in, D, H, W), of
            transposed convolutions (in, out, D, H, W); the moving statistics of batch norms under torch's names.
        kwargs: Arguments of the builder.

    Raises:
        UserError: An entry is missing, unexpected or of another shape.
    """
    from visattn.networks import create_model

    network = create_model(name, **kwargs)
    assert isinstance(network, AttentionUNet)
    given = dict(state_dict)
    names = dict(official_names(network))
    own = network.state_dict()
    projections = {ours: theirs for ours, theirs in names.items() if theirs.startswith("pam.conv_")}
    if projections and not any(theirs in given for theirs in projections.values()):
        # The official code never stores these (see `visattn.networks.agunet`), so what they were is lost.
        warnings.warn(
            f"official {name}: the weights do not hold the position attention's projections, as the authors' code "
            "never saves them; they start from new values, so train further before use",
            stacklevel=3,
        )
        given |= {theirs: own[ours] for ours, theirs in projections.items()}
    for theirs in projections.values():
        if theirs in given:
            given[theirs] = given[theirs].reshape(given[theirs].shape[:2])  # a 1x1x1 kernel is a matrix here
    load_renamed(network, given, lambda key: names.get(key, key), {}, f"official {name}")
    return network


def official_names(network: AttentionUNet) -> Iterator[tuple[str, str]]:
    """Our entries, each with its Keras name: Keras numbers the layers of a kind as they are created."""
    numbers = {"conv3d": count(), "batch_normalization": count(), "conv3d_transpose": count()}
    paths = {module: path for path, module in network.named_modules()}
    for module in _creation_order(network):
        if isinstance(module, PositionAttention | ChannelAttention):
            layer = "pam" if isinstance(module, PositionAttention) else "cam"
        else:
            kind = "conv3d_transpose" if isinstance(module, nn.modules.conv._ConvTransposeNd) else "conv3d"
            kind = "batch_normalization" if isinstance(module, nn.modules.batchnorm._BatchNorm) else kind
            number = next(numbers[kind])
            layer = f"{kind}_{number}" if number else kind
        norm = layer.startswith("batch")
        for key in module.state_dict():
            leaf = key.replace("weight", "gamma" if norm else "kernel").replace("bias", "beta" if norm else "bias")
            yield f"{paths[module]}.{key}", f"{layer}.{leaf}"


def _creation_order(network: AttentionUNet) -> Iterator[nn.Module]:
    def layers(module: nn.Module) -> Iterator[nn.Module]:
        return (part for part in module.modules() if not list(part.children()) and part.state_dict())

    for i, block in enumerate(network.encoder):
        if str(i) in network.pyramid:
            yield network.pyramid[str(i)]
        yield from layers(block)
    if isinstance(network.bottom, DualAttention):
        dual = network.bottom
        for attention, convolutions in ((dual.pam, dual.position), (dual.cam, dual.channel)):
            if attention is not None and convolutions is not None:
                yield attention
                yield from layers(convolutions)
        yield from (dual.conv, dual.norm)
    for level in reversed(network.decoder):
        if isinstance(level, GatedLevel):
            yield from (level.up.conv, level.norm)
            if level.gate is not None:
                gate = level.gate
                yield from (gate.x_conv, gate.x_norm, gate.skip_conv, gate.skip_norm, gate.psi, gate.psi_norm)
        else:
            assert isinstance(level, GuidedLevel)
            yield level.up.conv
            if level.guide is not None:
                yield level.guide.conv
            yield level.norm
        yield from layers(level.block)
    yield from reversed(network.heads)
