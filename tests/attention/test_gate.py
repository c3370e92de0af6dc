"""Attention gates against AGUNet's official outputs and their formulas in float64."""

import pytest
import torch
from torch import nn

from visattn.attention.gate import AttentionGate


def randomised(block):
    """`block` in float64 evaluation mode, with weights and running statistics that all show in the output."""
    torch.manual_seed(1)
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    return block.double().eval()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def official_gate(x, skip, convs, norms):
    """Our block with the official weights of one of AGUNet's gates."""
    block = AttentionGate(x.shape[1], skip.shape[1], rank=3, inter_dim=convs[0]["bias"].shape[0]).eval()
    state = {}
    for name, conv, norm in zip(("x", "skip", "psi"), convs, norms, strict=True):
        kernel, moving = ("psi", "psi_norm") if name == "psi" else (f"{name}_conv", f"{name}_norm")
        state |= {f"{kernel}.weight": conv["kernel"], f"{kernel}.bias": conv["bias"]}
        state |= {f"{moving}.weight": norm["gamma"], f"{moving}.bias": norm["beta"]}
        state |= {f"{moving}.running_{each}": norm[f"running_{each}"] for each in ("mean", "var")}
    missing = block.load_state_dict(state, strict=False).missing_keys
    assert all(key.endswith("num_batches_tracked") for key in missing)
    assert block.x_norm.eps == block.skip_norm.eps == block.psi_norm.eps == 1e-3
    with torch.no_grad():
        return block(x.movedim(1, -1), skip.movedim(1, -1)).movedim(-1, 1)


def worst(golden, reference, index, gate):
    """The largest error over all outputs of the official AGUNet, as a multiple of what is tolerated."""
    case = golden("agunet", "agunet_full")
    with torch.no_grad():
        outputs = reference("agunet").forward(case.input(index), case.state_dict(), 5, gate)
    stored = case.facts["cases"][index]["outputs"]
    assert set(outputs) == set(stored)
    return max(case.error(index, name, value) for name, value in outputs.items())


@pytest.mark.parametrize("index", [0, 1])
def test_official_network(golden, reference, index):
    assert worst(golden, reference, index, official_gate) <= 1


@pytest.mark.slow  # two more passes of a whole 3-D network
def test_the_official_network_pins_the_gate(golden, reference):
    def swapped(x, skip, convs, norms):
        return official_gate(x, skip, [convs[1], convs[0], convs[2]], norms)

    def shut(x, skip, convs, norms):
        return skip / 2

    assert worst(golden, reference, 1, swapped) > 100
    assert worst(golden, reference, 1, shut) > 100


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (2, 3, 5)])
def test_concatenating_formula(reference, size):
    block = randomised(AttentionGate(6, 4, rank=len(size), inter_dim=3))
    x, skip = draw(2, *size, 6), draw(2, *size, 4)
    expected = reference("gate").concatenate(x.movedim(-1, 1), skip.movedim(-1, 1), block.state_dict())
    torch.testing.assert_close(block(x, skip), expected.movedim(1, -1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize(
    ("coarse", "fine", "stride"),
    [
        ((3, 4), (6, 8), 2),
        ((3, 2), (7, 9), 2),
        ((5, 7), (5, 7), 1),
        ((1, 1), (6, 4), (3, 2)),
        ((2, 3, 2), (4, 7, 5), 2),
    ],
)
def test_adding_formula(reference, coarse, fine, stride, transform):
    block = AttentionGate(6, 4, form="add", rank=len(fine), stride=stride, output_transform=transform)
    block = randomised(block)
    x, skip = draw(2, *coarse, 6), draw(2, *fine, 4)
    maps = x.movedim(-1, 1), skip.movedim(-1, 1)
    expected = reference("gate").add(*maps, block.state_dict(), stride, transform)
    torch.testing.assert_close(block(x, skip), expected.movedim(1, -1), rtol=1e-10, atol=1e-12)


def test_an_axis_shorter_than_the_stride_is_filled_with_zeros():
    block = randomised(AttentionGate(4, form="add"))
    x, skip = draw(1, 1, 3, 4), draw(1, 1, 6, 4)
    padded = torch.cat([skip, torch.zeros_like(skip)], dim=1)
    torch.testing.assert_close(block.gate(x, skip), block.gate(x, padded)[:, :1])
    assert block(x, skip).shape == skip.shape


@pytest.mark.parametrize("form", ["concatenate", "add"])
def test_statistics_of_the_batch_in_training(form):
    """In training the norms are torch's own: outputs and running statistics of a copy made of torch's layers agree."""
    block = randomised(AttentionGate(4, form=form)).train()
    norm = block.psi_norm if form == "concatenate" else block.W[1]
    x, skip = draw(3, 4, 4, 4), draw(3, 4, 4, 4)
    seen = []
    twin = torch.nn.BatchNorm2d(norm.num_features, eps=norm.eps, momentum=norm.momentum).double()
    twin.load_state_dict(norm.state_dict())
    if form == "add":
        seen = block.W[0]((skip * block.gate(x, skip)).movedim(-1, 1))
        torch.testing.assert_close(block(x, skip), twin(seen).movedim(1, -1))
    else:
        parts = [
            torch.nn.functional.batch_norm(
                getattr(block, f"{name}_conv")(value.movedim(-1, 1)),
                None,
                None,
                getattr(block, f"{name}_norm").weight,
                getattr(block, f"{name}_norm").bias,
                training=True,
                eps=1e-3,
            )
            for name, value in (("x", x), ("skip", skip))
        ]
        seen = block.psi(torch.cat(parts, dim=1).relu())
        torch.testing.assert_close(block.gate(x, skip), torch.sigmoid(twin(seen)).movedim(1, -1))
    torch.testing.assert_close(norm.running_var, twin.running_var)
    torch.testing.assert_close(norm.running_mean, twin.running_mean)


@pytest.mark.parametrize("form", ["concatenate", "add"])
def test_gradients(form):
    block = randomised(AttentionGate(3, 4, form=form)).train()
    inputs = [draw(2, 2, 3, 3).requires_grad_(), draw(2, 2, 3, 4).requires_grad_()]
    parameters = list(block.parameters())
    assert torch.autograd.gradcheck(lambda *each: block(*each[:2]), (*inputs, *parameters), atol=1e-6)


@pytest.mark.parametrize("form", ["concatenate", "add"])
def test_a_gate_only_weakens(form):
    block = randomised(AttentionGate(4, form=form, output_transform=False))
    skip = draw(2, 6, 6, 4)
    assert (block(draw(2, 6, 6, 4), skip).abs() <= skip.abs()).all()


@pytest.mark.parametrize("form", ["concatenate", "add"])
def test_empty_batch_and_half_precision(form):
    block = AttentionGate(4, form=form)
    assert block(torch.zeros(0, 3, 3, 4), torch.zeros(0, 3, 3, 4)).shape == (0, 3, 3, 4)
    x, skip = torch.randn(2, 6, 6, 4), torch.randn(2, 6, 6, 4)
    block.eval()
    exact = block(x, skip)
    half = block.to(torch.bfloat16)(x.bfloat16(), skip.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).abs().max() <= 0.03 * exact.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "multiply"}, "'concatenate', 'add', got 'multiply'"),
        ({"stride": 2}, "stride needs form='add'"),
        ({"form": "add", "stride": (2, 2, 2)}, "stride must be one integer or 2"),
        ({"rank": 1}, "rank 2, 3"),
        ({"inter_dim": 0}, "inter_dim must be an integer of at least 1"),
    ],
)
def test_refused_arguments_say_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        AttentionGate(8, **arguments)


def test_refused_inputs_say_what_is_valid():
    block = AttentionGate(8, 4)
    with pytest.raises(ValueError, match=r"resize x \(1, 2, 2, 8\) to \(4, 4\), or use form='add'"):
        block(torch.zeros(1, 2, 2, 8), torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"AttentionGate's skip takes \(B, \*S, 4\)"):
        block(torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 8))
    with pytest.raises(ValueError, match="one batch size, got 1 and 2"):
        AttentionGate(8, form="add")(torch.zeros(1, 2, 2, 8), torch.zeros(2, 4, 4, 8))
