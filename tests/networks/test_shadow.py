"""What a network without storage keeps in 16 bits, byte by byte against torch's own autocast for CUDA.

Torch has tensors that say they lie on a GPU and hold nothing; their forward pass goes through its autocast without any
GPU (their backward pass does not).
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from visattn.attention import _neighborhood_gathered as gathered
from visattn.networks import create_model
from visattn.shadow import as_on_gpu, attend, backward, on_meta

PLAN_OF = gathered.plan_of
PYRAMID = {"backbone": "va_pyramid", "backbone_args": {"widths": [16, 32], "depths": [1, 1], "strides": [2, 2]}}


def pyramid(attention, **more):
    return {"name": "unet", **PYRAMID, "backbone_args": {**PYRAMID["backbone_args"], "attention": attention}, **more}


CASES = {
    "unet3d": ({"name": "unet3d", "filters": [8, 16]}, (2, 1, 16, 16, 16)),
    "neighborhood": (pyramid("neighborhood", skip="gate", decoder="residual"), (2, 3, 32, 32)),
    "window-3d": (pyramid("window", dims=3, decoder="full"), (1, 3, 8, 8, 8)),
}
SLOW = {
    "agent": (pyramid("agent", skip="cross_contextual", upsample="patch_expand"), (2, 3, 32, 32)),
    "bilevel": (pyramid("bilevel", skip="reverse"), (2, 3, 32, 32)),
    "partial": (pyramid("partial_channel"), (2, 3, 32, 32)),
    "halo": (pyramid("halo", decoder="ela"), (2, 3, 32, 32)),
    "biformer": ({"name": "unet", "backbone": "va_biformer_tiny"}, (2, 3, 64, 64)),
    "medvit": ({"name": "unet", "backbone": "va_medvit_tiny"}, (2, 3, 64, 64)),
    "maxvit": ({"name": "unet", "backbone": "va_maxvit_rmlp_pico_rw_256"}, (1, 3, 256, 256)),
    "pranet": ({"name": "pranet"}, (2, 3, 64, 64)),
    "att_swin_unet": ({"name": "att_swin_unet", "img_size": 64}, (2, 3, 64, 64)),
    "upernet": ({"name": "upernet", "backbone": "swin_tiny_patch4_window7_224", "width": 32}, (1, 3, 224, 224)),
    "daunet": ({"name": "daunet", "filters": [8, 16]}, (1, 1, 16, 16, 16)),
}


def planned(*settings):
    """The plan of a map for tensors that hold nothing: for a real GPU it is made on the CPU, and kept."""
    with _disable_current_modes():
        plan = PLAN_OF(*settings[:3], torch.device("cpu"), *settings[4:])
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"), plan
    )


class Fused(TorchFunctionMode):
    """Which kernel attends is asked of the GPU, which is not there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") != "scaled_dot_product_attention":
            return func(*args, **(kwargs or {}))
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = torch.utils._pytree.tree_map(
                lambda x: x.bfloat16() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x,
                (args, kwargs or {}),
            )
        return attend(*args, **kwargs)


def kept(network, x):
    """Bytes of each tensor that the backward pass will need, but for weights and the image, and what they are."""
    known = {each.untyped_storage()._cdata for each in [*network.parameters(), *network.buffers(), x]}
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage._cdata not in known and storage.nbytes():
            found[storage._cdata] = (storage.nbytes(), tuple(tensor.shape), str(tensor.dtype))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x)
    return sorted(found.values())


def kept_by_cuda(network, shape):
    """The same of tensors that say they lie on a GPU, under its autocast."""
    with FakeTensorMode():
        memo = {
            id(each): nn.Parameter(torch.empty(each.shape, device="cuda"), each.requires_grad)
            for each in network.parameters()
        }
        memo |= {id(each): torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in network.buffers()}
        network, x = copy.deepcopy(network, memo), torch.empty(shape, device="cuda")
        # As torch.autocast does, which looks for a GPU.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            with Fused():
                return kept(network, x)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # where a block turns autocast off
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_16_bits_keep_what_autocast_keeps(case, monkeypatch):
    monkeypatch.setattr(gathered, "_plain", lambda x: True)
    config, shape = {**CASES, **SLOW}[case]
    network = create_model(in_channels=shape[1], **config).train()
    with as_on_gpu(torch.bfloat16):
        ours = kept(on_meta(network), torch.empty(shape, device="meta"))
    monkeypatch.setattr(gathered, "plan_of", functools.cache(planned))
    assert ours == kept_by_cuda(network, shape)
    assert "torch.bfloat16" in {kind for _, _, kind in ours}


def test_attention_keeps_no_weights():
    q = torch.empty(2, 4, 100, 32, device="meta", requires_grad=True)
    mask = torch.empty(100, 100, dtype=torch.bool, device="meta")

    def largest(*more, **settings):
        sizes = []

        def pack(x):
            sizes.append(x.untyped_storage().nbytes())
            return x

        with as_on_gpu(), saved_tensors_hooks(pack, lambda x: x):
            out = F.scaled_dot_product_attention(*more, **settings)
        assert out.shape == more[0].shape
        return max(sizes)

    assert largest(q, q, q) == 4 * q.numel()
    assert largest(q, q, q, attn_mask=mask) == 4 * q.numel(), "the mask is one for all heads"
    odd = torch.empty(2, 4, 100, 30, device="meta", requires_grad=True)
    assert largest(odd, odd, odd) >= 4 * 2 * 4 * 100 * 100, "no kernel takes heads of 30 numbers in float32"
    assert largest(*[odd.bfloat16()] * 3) == 2 * odd.numel(), "in 16 bits one does"


def test_checkpoints_compute_again_in_16_bits_and_gradients_do_not():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x @ x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            kinds.append((x.float() @ grad.float()).dtype)
            return grad

    kinds, again = [], []

    def layer(x):
        again.append((x @ weight).dtype)
        return Square.apply(x @ weight)

    weight = nn.Parameter(torch.empty(8, 8, device="meta"))
    with as_on_gpu(torch.bfloat16) as leave:
        out = torch.utils.checkpoint.checkpoint(layer, torch.empty(8, 8, device="meta"), use_reentrant=False)
        leave()
        backward(out.float().sum())
    assert again == [torch.bfloat16] * 2
    assert kinds == [torch.float32]
    assert weight.grad.dtype == torch.float32
