"""What a network consists of and what it costs, computed without running it: on tensors that have no storage.

Counted are the operations of matrix products, convolutions and attention, a multiplication and an addition as two
(`torch.utils.flop_counter`); what works value by value is not. Memory is what tensors hold at the moment when most of
them live, as the forward and the backward pass make and free them, in float32 or as under autocast, with attention by
a fused kernel (`visattn.shadow`). The workspace of kernels, what the loss keeps beside a float32 copy of the maps, and
what an allocator holds back come on top.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from visattn.errors import UserError
from visattn.shadow import as_on_gpu, backward, on_meta

_FLOAT = 4
_ADAM = 2  # moments for each weight
_ADAM_STEP = 1  # numbers for each weight that its step makes and drops


@dataclass(frozen=True)
class Part:
    """A module of the network.

    Args:
        name: Its name in the state dict, without what only wraps a backbone.
        kind: Its class.
        output: Shapes that it gives for one image, without the batch; empty where it is not called as a module.
        parameters: Number of its parameters, those of its own parts included.
        depth: 0 for a part of the network, 1 for a part of that.
    """

    name: str
    kind: str
    output: tuple[tuple[int, ...], ...]
    parameters: int
    depth: int


@dataclass(frozen=True)
class Summary:
    """What `summarise` finds.

    Args:
        input: Channels and spatial size of an image.
        output: Shapes that the network gives for one image.
        parts: The network's parts and theirs.
        layers: Number of modules that have parameters of their own.
        parameters: Number of parameters.
        trainable: Those of them that training changes.
        flops: Operations of a prediction for one image.
        batch: Images in the step of training.
        weight_bytes: Of parameters and buffers.
        predict_bytes: Of all other tensors of a prediction for one image, at their most.
        step_bytes: Likewise of a step of training, the gradients of the weights included, without an optimiser.
        mixed_step_bytes: The same in bf16-mixed.
    """

    input: tuple[int, ...]
    output: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]
    layers: int
    parameters: int
    trainable: int
    flops: int
    batch: int
    weight_bytes: int
    predict_bytes: int
    step_bytes: int
    mixed_step_bytes: int

    @property
    def inference_memory(self) -> int:
        """Bytes of a prediction for one image."""
        return self.weight_bytes + self.predict_bytes

    def training_memory(self, mixed: bool = False) -> int:
        """Bytes of a step of training with Adam; `mixed`: in 16 bits where that is exact enough."""
        gradients = _FLOAT * self.trainable
        passes = self.mixed_step_bytes if mixed else self.step_bytes
        # Both passes are over, and their activations gone, when the optimiser's step needs its own.
        return self.weight_bytes + gradients * _ADAM + max(passes, gradients * (1 + _ADAM_STEP))


def summarise(network: nn.Module, shape: Sequence[int], batch: int = 2) -> Summary:
    """Compute what a network costs; nothing of it is changed.

    Args:
        network: Any network that takes images (B, C, *S).
        shape: (C, *S) of an image.
        batch: Images in a step of training.

    Raises:
        UserError: The network does not take such images, or what it does depends on their values.
    """
    shadow = on_meta(network)
    size = " x ".join(str(n) for n in shape)
    try:
        outputs: dict[str, Any] = {}
        handles = [
            module.register_forward_hook(_keep(outputs, name)) for name, module in shadow.named_modules() if name
        ]
        shadow.eval()
        image = torch.empty(1, *shape, device="meta")
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), as_on_gpu(), counter, _Living(shadow, image) as predicting:
            result = shadow(image)
        for handle in handles:
            handle.remove()
        shadow.train()
        images = torch.empty(batch, *shape, device="meta")
        step, mixed = (_step(shadow, images, kind) for kind in (None, torch.bfloat16))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"the network cannot be summarised for images of {size} ({type(error).__name__}: {first})"
        ) from error
    parameters = list(shadow.parameters())
    return Summary(
        input=tuple(shape),
        output=_shapes(result),
        parts=tuple(_parts(shadow, outputs)),
        layers=sum(any(True for _ in module.parameters(recurse=False)) for module in shadow.modules()),
        parameters=sum(each.numel() for each in parameters),
        trainable=sum(each.numel() for each in parameters if each.requires_grad),
        flops=counter.get_total_flops(),
        batch=batch,
        weight_bytes=sum(each.numel() * each.element_size() for each in [*parameters, *shadow.buffers()]),
        predict_bytes=predicting.most,
        step_bytes=step,
        mixed_step_bytes=mixed,
    )


def _step(shadow: nn.Module, images: Tensor, kind: torch.dtype | None) -> int:
    """Bytes of the forward and the backward pass at their most, products being computed in `kind`."""
    with _Living(shadow, images) as training, as_on_gpu(kind) as leave:
        maps = [each.float() for each in tree_leaves(shadow(images)) if isinstance(each, Tensor)]
        leave()
        backward(torch.stack([each.square().sum() for each in maps]).sum())
        for parameter in shadow.parameters():
            parameter.grad = None
    most: int = training.most
    return most


def amount(number: float, unit: str) -> str:
    """A number of bytes, operations or parameters with three digits: `1.23 GB`."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            value = number / factor
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {letter}{unit}"
    return f"{number:.0f} {unit}"


class _Living(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the storages that live, but for those of the network and of the image."""

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        known = [image, *network.parameters(), *network.buffers()]
        self._kept = [each.untyped_storage() for each in known]
        self._seen: dict[int, Any] = {each._cdata: None for each in self._kept}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._add(each.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.most = max(self.most, self.now)
        self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))

    def _drop(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size


def _keep(outputs: dict[str, Any], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, given: Any, output: Any) -> None:
        outputs[name] = _shapes(output)

    return hook


def _shapes(output: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(each.shape[1:]) for each in tree_leaves(output) if isinstance(each, Tensor))


def _parts(network: nn.Module, outputs: dict[str, Any]) -> list[Part]:
    rows: list[Part] = []

    def visit(module: nn.Module, prefix: str, depth: int, shown: str = "") -> None:
        for name, child in module.named_children():
            full, count = prefix + name, sum(each.numel() for each in child.parameters())
            if not count:
                continue
            # A list of modules, and what wraps a backbone whole, say nothing of their own.
            wraps = depth and name in ("net", "model")
            if isinstance(child, nn.ModuleList | nn.ModuleDict) or wraps:
                visit(child, f"{full}.", depth, shown if wraps else f"{shown}{name}.")
                continue
            rows.append(Part(shown + name, type(child).__name__, outputs.get(full, ()), count, depth))
            if not prefix:
                visit(child, f"{full}.", depth + 1, f"{shown}{name}.")

    visit(network, "", 0)
    return rows
