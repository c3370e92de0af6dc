"""Any timm model as a source of feature maps, of images or, for our backbones that take them, of volumes.

timm's `features_only=True` gives maps from fine to coarse for almost every model it has. What differs between models is
hidden here: channels-last outputs, models built for one input size, window and block sizes that the input must be a
multiple of, and backbone weights from a file.
"""

import copy
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from visattn.errors import UserError, unknown
from visattn.weights import read_weights

# Fixed by the networks, so `backbone_args` may not set them; `checkpoint_path` and the like would load files unseen.
RESERVED = {
    *("cache_dir", "checkpoint_path", "feature_cls", "features_only", "in_chans", "model_name", "num_classes"),
    *("out_indices", "output_fmt", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"),
}
# Ways to tell timm that the input size may vary, newest first; a model takes one of them or none.
_ANY_SIZE: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
_FACTORS = (1, 2, 4, 7, 8, 12, 14, 16, 32)  # window and block sizes in use, tried as multiples of the largest reduction
_HUB_SECONDS = 5.0  # to connect to the hub before giving up; its own retries take about a minute


class TimmFeatures(nn.Module):
    """The last maps of a timm model, finest first, as (B, C, *S).

    Args:
        name: A timm model, e.g. `res2net50d`, or with a weights tag, `convnext_tiny.fb_in22k`.
        maps: How many of its last feature maps to return; None: all that it has.
        in_channels: Input channels. With pretrained weights timm's rule adapts the first convolution: one channel sums
            the three, more repeat them with the scale kept.
        pretrained: True downloads timm's weights; a path reads them from a file (safetensors or torch.save) of the
            whole timm model or of these features; False leaves timm's initialisation.
        options: Further arguments of the timm model, e.g. `{"drop_path_rate": 0.1}`.
        dims: Spatial axes of the input.

    Attributes:
        features: (channels, reduction) of the maps, finest first; a reduction is one number, or one per axis where they
            differ.
        multiple: Each side of the input must be a multiple of this; one number per axis.
        fixed_size: The only size the model takes, or None if any multiple will do.

    Raises:
        UserError: There is no such model, it has too few maps, or its weights cannot be had.
    """

    def __init__(
        self,
        name: str,
        maps: int | None,
        in_channels: int = 3,
        pretrained: bool | str | Path = False,
        options: Mapping[str, Any] | None = None,
        dims: int = 2,
    ) -> None:
        super().__init__()
        options = dict(options or {})
        net, options = _build(name, maps, in_channels, pretrained is True, options)
        if isinstance(pretrained, str | Path):
            _load_backbone(net, name, read_weights(pretrained), options, f"pretrained: {pretrained}")
        info: Any = net.feature_info
        self.dims = dims
        self.features: list[tuple[int, int | tuple[int, ...]]] = [
            (each["num_chs"], each.get("reductions", each["reduction"])) for each in info.get_dicts()
        ]
        self.net = net
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).upper().endswith("NHWC")
        if maps is not None and len(self.features) < maps:
            raise UserError(f"backbone '{name}' has {len(self.features)} feature maps, but {maps} are needed")
        self.multiple, self.fixed_size = self._rehearse(name, in_channels, options)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of `x` (B, in_channels, H, W), whose sides `padded_size` accepts."""
        return self._channels_first(self.net(x))

    def padded_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The smallest size that the model takes and that holds an image of the spatial `size`.

        Raises:
            UserError: The model takes one size only, and the image is larger.
        """
        if self.fixed_size is None:
            return tuple(_ceil(side, by) for side, by in zip(size, self.multiple, strict=True))
        if size[0] > self.fixed_size[0] or size[1] > self.fixed_size[1]:
            height, width = self.fixed_size
            raise UserError(
                f"this backbone takes images of {height}x{width} pixels only, not {size[0]}x{size[1]}.\n"
                f"Set data.size to [{height}, {width}], give backbone_args: {{img_size: [{size[0]}, {size[1]}]}} if "
                "the model has it, or choose another backbone."
            )
        return self.fixed_size

    def _channels_first(self, maps: Any) -> list[Tensor]:
        return [feature.movedim(-1, 1) if self.channels_last else feature for feature in maps]

    def _rehearse(
        self, name: str, in_channels: int, options: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """Run the model on tensors without storage: (multiples, fixed size), and what it never uses is frozen."""
        tensors = [*self.net.parameters(), *self.net.buffers()]
        # In the copy each tensor is replaced by one that has a shape and no values, so copying costs nothing.
        memo: dict[int, Any] = {id(t): t.detach().to("meta").requires_grad_(t.requires_grad) for t in tensors}
        for parameter in self.net.parameters():
            memo[id(parameter)] = nn.Parameter(memo[id(parameter)])
        shadow = copy.deepcopy(self.net, memo).eval()
        reductions = [(each,) * self.dims if isinstance(each, int) else each for _, each in self.features]
        coarsest = [math.lcm(*axis) for axis in zip(*reductions, strict=True)]
        trials: list[tuple[int | None, tuple[int, ...]]] = [
            (factor, tuple((2 + i) * side * factor for i, side in enumerate(coarsest))) for factor in _FACTORS
        ]
        if self.dims == 2:
            native = options.get("img_size") or _config(name).input_size[-2:]
            trials.append((None, (native, native) if isinstance(native, int) else tuple(map(int, native))))
        for factor, size in trials:
            try:
                # Both ways round, lest a trial be the one size that the model was built for.
                for shape in (size,) if factor is None else (size[::-1], size):
                    maps = self._channels_first(shadow(torch.empty(1, in_channels, *shape, device="meta")))
            except (RuntimeError, AssertionError, ValueError, NotImplementedError):
                continue  # what a model raises for a size it was not built for
            if [feature.shape[1] for feature in maps] != [channels for channels, _ in self.features]:
                continue
            _freeze_unused(self.net, shadow, maps)
            return ((1,) * self.dims, size) if factor is None else (tuple(side * factor for side in coarsest), None)
        kind = "images" if self.dims == 2 else "volumes"
        raise UserError(f"backbone '{name}' gives no feature maps of {kind} that a head could read; choose another one")


def _freeze_unused(net: nn.Module, shadow: nn.Module, maps: list[Tensor]) -> None:
    """Parameters that no map depends on would never get a gradient, which distributed training takes for an error."""
    total = torch.stack([feature.sum() for feature in maps]).sum()
    gradients: Sequence[Tensor | None] = torch.autograd.grad(total, list(shadow.parameters()), allow_unused=True)
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def _config(name: str) -> Any:
    """The record that timm keeps of the model's weights and input; the defaults for a model registered without one."""
    import timm

    return timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg(input_size=(3, 224, 224))


def _ceil(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _build(
    name: str, maps: int | None, in_channels: int, pretrained: bool, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The timm model, and the arguments that it was built with."""
    import timm  # takes seconds, so only where a network is built

    if not isinstance(name, str) or ":" in name or not timm.is_model(name):
        raise unknown("backbone", str(name), timm.list_models())
    for key in options:
        if key in RESERVED:
            raise UserError(f"backbone_args: '{key}' is set by the network; remove it")
    if pretrained:
        check_available(name)
    fixed = _config(name).fixed_input_size
    refusal: TypeError | None = None
    for extra in _ANY_SIZE if fixed and "img_size" not in options else ({},):
        arguments = {**extra, **options}
        wanted: dict[str, Any] = {} if maps is None else {"out_indices": tuple(range(-maps, 0))}
        try:
            net: nn.Module = timm.create_model(
                name,
                pretrained=pretrained,
                in_chans=in_channels,
                features_only=True,
                **wanted,
                **arguments,
            )
        except TypeError as error:
            refusal = error  # an argument that the model does not have
        except UserError as error:
            raise UserError(f"backbone '{name}': {error}") from error
        except Exception as error:  # whatever timm, the hub and the file raise
            raise _explained(name, pretrained, error) from error
        else:
            return net, arguments
    raise UserError(f"backbone '{name}' does not take backbone_args {options}: {refusal}") from refusal


def _explained(name: str, pretrained: bool, error: Exception) -> UserError:
    first = (str(error).splitlines() or [""])[0][:200]
    if pretrained:
        return UserError(
            f"pretrained: true: the weights of '{name}' cannot be had ({type(error).__name__}: {first})\n{_INSTEAD}"
        )
    return UserError(
        f"backbone '{name}' cannot be built as feature maps ({type(error).__name__}: {first})\nChoose another backbone."
    )


_INSTEAD = (
    "Set pretrained: false, or pretrained: PATH of a .safetensors or .pth file with the backbone's weights "
    "(download it where there is a network)."
)


def check_available(name: str) -> None:
    """Refuse quickly where the hub cannot be reached and the weights are not in its cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = _config(name)
    if not (config.hf_hub_id or config.url):
        raise UserError(f"pretrained: true: timm has no weights for '{name}'.\n{_INSTEAD}")
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return  # a direct connection would say nothing
    files = ("model.safetensors", "pytorch_model.bin")
    if config.hf_hub_id and any(isinstance(try_to_load_from_cache(config.hf_hub_id, file), str) for file in files):
        return
    address = urlsplit(constants.ENDPOINT if config.hf_hub_id else config.url)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=_HUB_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"pretrained: true: {address.hostname} cannot be reached to download '{name}' ({error}).\n{_INSTEAD}"
        ) from error


def _load_backbone(
    net: nn.Module, name: str, state: dict[str, Tensor], options: Mapping[str, Any], source: str
) -> None:
    """Fill every entry of the feature extractor `net` from the state dict of the whole model, or of `net` itself."""
    import timm

    own = net.state_dict()
    if state.keys() >= own.keys() - _counters(own) and state.keys() <= own.keys():
        given = {key: state.get(key, own[key]) for key in own}
    else:
        given = _by_plain_name(_whole_model(name, state, options, source))
        missing = [key for key in own if _plain(key) not in given]
        if missing:
            raise UserError(f"{source}: no entry for {missing[0]} ({len(missing)} missing) of backbone '{name}'")
        given = {key: given[_plain(key)] for key in own}
    first = _config(name).first_conv
    first_names = {f"{_plain(conv)}.weight" for conv in ([first] if isinstance(first, str) else first or [])}
    for key, value in given.items():
        if value.shape == own[key].shape:
            continue
        if _plain(key) in first_names and value.ndim == 4:
            try:
                value = timm.models.adapt_input_conv(own[key].shape[1], value)
            except NotImplementedError as error:
                raise UserError(f"{source}: {key} cannot be adapted to {own[key].shape[1]} input channels") from error
        if value.shape != own[key].shape:
            raise UserError(
                f"{source}: {key} is {tuple(value.shape)}, but backbone '{name}' has {tuple(own[key].shape)}"
            )
        given[key] = value
    net.load_state_dict(given)


def _whole_model(name: str, state: dict[str, Tensor], options: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """`state` as timm reads it into the whole three-channel model, where every entry must match."""
    import timm

    classifier = _config(name).classifier
    heads = [classifier] if isinstance(classifier, str) else list(classifier or [])
    # The classifier is no part of the features. Without it in the configuration, timm loads strictly.
    body = {key: value for key, value in state.items() if key.rpartition(".")[0] not in heads}
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=True,
            num_classes=0,
            pretrained_cfg_overlay={"state_dict": body, "num_classes": 0, "classifier": None},
            **options,
        )
    except Exception as error:  # timm's own conversions raise anything for a foreign file
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = "\n".join(line[:200] for line in (lines[1:3] if len(lines) > 1 else lines[:1]))
        raise UserError(
            f"{source}: these are not the weights of backbone '{name}':\n{shown}\n"
            "A checkpoint of visattn goes into init_from instead."
        ) from error
    return model.state_dict()


def _by_plain_name(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_plain(key): value for key, value in state.items()}


def _plain(key: str) -> str:
    """A key without what timm's wrappers change: `stages_0` for `stages.0`, and a prefix `model.` or `body.`."""
    parts = key.replace("_", ".").split(".")
    return ".".join(parts[1:] if parts[0] in ("model", "body") else parts)


def _counters(state: Mapping[str, Tensor]) -> set[str]:
    return {key for key in state if key.endswith("num_batches_tracked")}
