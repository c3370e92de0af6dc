"""Optimisers and learning-rate schedules by name, for the `optimizer` and `schedule` blocks of a recipe."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from visattn.errors import UserError, did_you_mean, unknown

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


_SECOND_ORDER = {"adahessian"}  # needs a second backward pass, which no task makes


def known_optimizers() -> list[str]:
    """Names that a recipe may use: torch's three, and those of timm."""
    import timm.optim

    factory: Any = timm.optim
    return sorted({*OPTIMIZERS, *factory.list_optimizers()} - _SECOND_ORDER)


def _class(name: Any) -> Callable[..., Optimizer]:
    """The optimiser of that name.

    Raises:
        UserError: There is none; the nearest is named.
    """
    if isinstance(name, str) and name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if not isinstance(name, str) or name not in known_optimizers():
        # The usual ones first: timm has a namesake one slip away from each of them.
        hint = did_you_mean(str(name)[:200], OPTIMIZERS) or did_you_mean(str(name)[:200], known_optimizers())
        raise UserError(
            f"unknown optimizer '{str(name)[:200]}'.{hint}\nKnown: {', '.join(sorted(OPTIMIZERS))}, and those of timm "
            f"({', '.join(known_optimizers()[:12])}, ...)"
        )
    import timm.optim

    factory: Any = timm.optim
    return cast(Callable[..., Optimizer], factory.get_optimizer_class(name, bind_defaults=True))


def _keywords(
    function: Callable[..., Any], block: Mapping[str, Any], where: str, skip: Iterable[str], more: Iterable[str] = ()
) -> dict[str, Any]:
    """`block` without its name, refused when it holds a key that `function` does not take."""
    valid = [name for name in inspect.signature(function).parameters if name not in {"self", *skip}]
    keywords = {key: value for key, value in block.items() if key != "name"}
    for key in keywords:
        if key not in valid:
            raise unknown(f"key in {where}:", key, ["name", *valid, *more])
    return keywords


def parameter_groups(
    network: nn.Module,
    lr: float,
    weight_decay: float,
    backbone_lr_factor: float = 1.0,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameters grouped by learning rate and decay.

    Vectors and scalars (biases, norm scales) are not decayed, nor is what a network names in `no_weight_decay()`.
    Parameters under `backbone.` get `lr * backbone_lr_factor`. With `layer_decay` each layer, as the model's
    `group_matcher` counts them, gets that share of the learning rate of the layer after it. Frozen parameters are left
    out.
    """
    skip: Iterable[str] = getattr(network, "no_weight_decay", tuple)()
    if layer_decay is not None:
        import timm.optim

        factory: Any = timm.optim
        layers = factory.param_groups_layer_decay(network, weight_decay, tuple(skip), layer_decay=layer_decay)
        return [
            {"params": layer["params"], "lr": lr * layer["lr_scale"], "weight_decay": layer["weight_decay"]}
            for layer in layers
        ]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            rate = lr * (backbone_lr_factor if name.startswith("backbone.") else 1.0)
            decay = 0.0 if parameter.ndim <= 1 or name in skip else weight_decay
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def check_optimizer(config: Mapping[str, Any]) -> None:
    """Refuse an unknown optimiser or key before any work is done."""
    name = config.get("name", "adamw")
    keywords = _keywords(_class(name), config, "model.optimizer", skip=("params", "defaults", "kwargs"))
    for key in ("lr", "weight_decay"):
        if key in keywords and (isinstance(keywords[key], bool) or not isinstance(keywords[key], int | float)):
            raise UserError(f"model.optimizer.{key}: must be a number, got '{keywords[key]}'")
        if key in keywords and not 0 <= keywords[key] < math.inf:
            raise UserError(f"model.optimizer.{key}: must be a finite number >= 0, got {keywords[key]}")


def build_optimizer(
    config: Mapping[str, Any], network: nn.Module, backbone_lr_factor: float = 1.0, layer_decay: float | None = None
) -> Optimizer:
    """The optimiser that a recipe's block names, e.g. `{name: adamw, lr: 5e-4, weight_decay: 0.01}`."""
    check_optimizer(config)
    keywords = {key: value for key, value in config.items() if key != "name"}
    lr = keywords.pop("lr", 1e-3)
    groups = parameter_groups(network, lr, keywords.pop("weight_decay", 0.0), backbone_lr_factor, layer_decay)
    if not groups:
        raise UserError("model.freeze: every parameter is frozen, nothing is left to train")
    if "betas" in keywords:
        keywords["betas"] = tuple(keywords["betas"])
    return _class(config.get("name", "adamw"))(groups, lr=lr, **keywords)


def cosine(progress: float, floor: float = 0.0) -> float:
    """Half a cosine from 1 to `floor` (a share of the learning rate)."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def poly(progress: float, power: float = 0.9) -> float:
    """(1 - progress) ** power."""
    return float((1 - progress) ** power)


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def step(progress: float, milestones: tuple[float, ...] = (0.6, 0.85), gamma: float = 0.1) -> float:
    """`gamma` to the number of `milestones` (shares of the run) passed."""
    return float(gamma ** sum(progress >= milestone for milestone in milestones))


_EPOCHS = ("warmup_epochs", "cooldown_epochs")  # keys of every schedule

SCHEDULES: dict[str, Callable[..., float]] = {"cosine": cosine, "poly": poly, "constant": constant, "step": step}


def check_schedule(config: Mapping[str, Any]) -> None:
    """Refuse an unknown schedule or key before any work is done."""
    name = config.get("name", "constant")
    if not isinstance(name, str) or name not in SCHEDULES:
        raise unknown("schedule", str(name), SCHEDULES)
    rest = {key: value for key, value in config.items() if key not in _EPOCHS}
    _keywords(SCHEDULES[name], rest, "model.schedule", skip=("progress",), more=_EPOCHS)
    for key in _EPOCHS:
        epochs = config.get(key, 0)
        if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 <= epochs < math.inf:
            raise UserError(f"model.schedule.{key}: must be a number of epochs >= 0, got '{epochs}'")
    values = {key: value for key, value in rest.items() if key != "name"}
    for progress in (0.0, 0.5, 1.0):
        try:
            reached = float(SCHEDULES[name](progress, **values))
        except (ArithmeticError, TypeError, ValueError) as error:
            raise UserError(f"model.schedule: {name} cannot be computed with {values!r:.200}: {error}") from error
        if not math.isfinite(reached):
            raise UserError(f"model.schedule: {name} becomes {reached} with {values!r:.200}")


def build_schedule(
    config: Mapping[str, Any] | None, optimizer: Optimizer, total_steps: int, steps_per_epoch: float
) -> LambdaLR:
    """A per-step schedule: linear warm-up over `warmup_epochs`, the named curve, and its end for `cooldown_epochs`."""
    config = dict(config or {"name": "constant"})
    check_schedule(config)
    curve = SCHEDULES[config.pop("name", "constant")]
    warmup = round(float(config.pop("warmup_epochs", 0)) * steps_per_epoch)
    if warmup >= total_steps > 0:
        warmup = total_steps // 2  # a short run (fast_dev_run, a demo) still reaches its full rate
    cooldown = min(round(float(config.pop("cooldown_epochs", 0)) * steps_per_epoch), (total_steps - warmup) // 2)

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / (warmup + 1)
        return float(curve(min((done - warmup) / max(total_steps - warmup - cooldown, 1), 1.0), **config))

    return LambdaLR(optimizer, factor)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimiser's running means will take once it has stepped."""
    one = isinstance(optimizer, torch.optim.SGD)
    means = 1 if one else 2  # timm's optimisers hold two at most
    return sum(
        p.numel() * p.element_size() * (means + int(group.get("amsgrad", False)))
        for group in optimizer.param_groups
        for p in group["params"]
        if means == 2 or group.get("momentum", 0)
    )


def freeze(network: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Switch off the gradient of every parameter whose name matches one of `patterns` (shell wildcards).

    Raises:
        UserError: a pattern matches nothing.
    """
    frozen = []
    for pattern in patterns:
        names = [name for name, _ in network.named_parameters() if fnmatch(name, pattern)]
        if not names:
            first = ", ".join(sorted({name.split(".")[0] + ".*" for name, _ in network.named_parameters()}))
            raise UserError(f"model.freeze: '{pattern}' matches no parameter. Top level: {first}")
        frozen += names
    for name, parameter in network.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return sorted(set(frozen))
