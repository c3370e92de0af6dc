"""Full attention and its reductions against loops, against MedViTV2's block that contains one, and the controls."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from visattn.attention.controls import DepthwiseConvolution, Identity
from visattn.attention.full import FullAttention

CHOICES = [("vit", 1), ("pvt", 1), ("pvt", 2), ("e_mhsa", 1), ("e_mhsa", 2)]


def randomised(block):
    """`block` in float64 with weights large enough that every one of them shows in the output."""
    torch.manual_seed(1)
    for parameter in block.double().eval().parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for name, buffer in block.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(buffer)
        elif name.endswith("running_var"):
            torch.nn.init.uniform_(buffer, 0.5, 2)
    return block


def loops(block, x):
    """The block by its definition, in numpy: one query at a time."""
    weights = {name: value.numpy() for name, value in block.state_dict().items()}
    heads, dim, sizes = block.num_heads, x.shape[-1], x.shape[1:-1]
    width = dim // heads

    def linear(name, tokens):
        return tokens @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    out = np.zeros(x.shape)
    for image, result in zip(x, out, strict=True):
        tokens = image.reshape(-1, dim)
        fewer = tokens
        if block.sr_ratio > 1 and block.variant == "pvt":
            ratio, rows = block.sr_ratio, []
            grown = np.zeros((*(max(size, ratio) for size in sizes), dim))
            grown[tuple(slice(size) for size in sizes)] = image
            for corner in np.ndindex(*(size // ratio for size in grown.shape[:-1])):
                patch = grown[tuple(slice(ratio * at, ratio * at + ratio) for at in corner)]
                mixed = np.tensordot(weights["sr.weight"], np.moveaxis(patch, -1, 0), patch.ndim) + weights["sr.bias"]
                rows.append((mixed - mixed.mean()) / math.sqrt(mixed.var() + 1e-5))
            fewer = np.array(rows) * weights["norm.weight"] + weights["norm.bias"]
        elif block.sr_ratio > 1:
            run = min(block.sr_ratio ** len(sizes), len(tokens))
            fewer = np.array([tokens[at : at + run].mean(0) for at in range(0, len(tokens) - run + 1, run)])
            scale = weights["norm.weight"] / np.sqrt(weights["norm.running_var"] + 1e-5)
            fewer = (fewer - weights["norm.running_mean"]) * scale + weights["norm.bias"]
        if block.variant == "vit":
            q, k, v = np.split(linear("qkv", tokens), 3, -1)
        elif block.variant == "pvt":
            q, (k, v) = linear("q", tokens), np.split(linear("kv", fewer), 2, -1)
        else:
            q, k, v = linear("q", tokens), linear("k", fewer), linear("v", fewer)
        mixed = np.zeros(tokens.shape)
        for token in range(len(tokens)):
            for head in range(heads):
                part = slice(head * width, head * width + width)
                scores = np.array([q[token, part] @ key[part] for key in k]) / math.sqrt(width)
                shares = np.exp(scores - scores.max())
                mixed[token, part] = (shares[:, None] * v[:, part]).sum(0) / shares.sum()
        result[:] = linear("proj", mixed).reshape(image.shape)
    return out


@pytest.mark.parametrize(("variant", "sr_ratio"), CHOICES)
@pytest.mark.parametrize("sizes", [(7,), (1,), (5, 4), (1, 3), (2, 3, 5), (1, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_loops_agree(variant, sr_ratio, sizes, bias):
    block = FullAttention(12, 3, variant=variant, sr_ratio=sr_ratio, rank=len(sizes), qkv_bias=bias)
    x = torch.randn(2, *sizes, 12, dtype=torch.float64)
    with torch.no_grad():
        np.testing.assert_allclose(randomised(block)(x).numpy(), loops(block, x.numpy()), rtol=1e-10, atol=1e-11)


class GlobalFeaturePerception(torch.nn.Module):
    """MedViTV2's block around E-MHSA, written from its description for one golden case.

    In order: average pooling and 1x1 convolution, E-MHSA, a grouped convolution on a projection of the result, and a
    KAN over memory that is reshaped to channels last rather than permuted.
    """

    def __init__(self, state):
        super().__init__()
        self.state = state
        self.attention = FullAttention(96, 3, variant="e_mhsa", sr_ratio=2)
        own = {key.removeprefix("e_mhsa."): value for key, value in state.items() if key.startswith("e_mhsa.")}
        self.attention.load_state_dict(own, strict=False)

    def norm(self, name, x):
        names = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{each}"] for each in names))

    def layer(self, name, x):
        x = F.layer_norm(x, x.shape[-1:], self.state[f"{name}.layernorm.weight"], self.state[f"{name}.layernorm.bias"])
        basis = 1 - torch.tanh((x[..., None] - self.state[f"{name}.rbf.grid"]) / 0.33) ** 2
        return F.linear(basis.flatten(-2), self.state[f"{name}.spline_linear.weight"])

    def forward(self, x):
        x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        x = self.norm("patch_embed.norm", F.conv2d(x, self.state["patch_embed.conv.weight"]))
        normed = self.norm("norm1", x).movedim(1, -1)
        x = x + self.attention(normed).movedim(-1, 1)
        out = self.norm("projection.norm", F.conv2d(x, self.state["projection.conv.weight"]))
        mixed = F.conv2d(out, self.state["mhca.group_conv3x3.weight"], padding=1)
        out = out + F.conv2d(F.relu(self.norm("mhca.norm", mixed)), self.state["mhca.projection.weight"])
        x = torch.cat([x, out], 1)
        rows = self.norm("norm2", x).reshape(-1, x.shape[1])
        return x + self.layer("kan.layers.1", self.layer("kan.layers.0", rows)).reshape(x.shape)


@pytest.mark.parametrize("index", [0, 1])
def test_official_block_around_e_mhsa(golden, index):
    case = golden("medvitv2", "gfp_a")
    block = GlobalFeaturePerception(case.state_dict()).eval()
    assert case.error(index, "out", block(case.input(index))) <= 1
    block.attention.norm.eps = 0.1
    assert case.error(index, "out", block(case.input(index))) > 5


def test_official_keys():
    def keys(**settings):
        return {key.rsplit(".", 1)[0] for key in FullAttention(32, **settings).state_dict()}

    assert keys() == {"qkv", "proj"}
    assert keys(variant="pvt") == {"q", "kv", "proj"}
    assert keys(variant="pvt", sr_ratio=4) == {"q", "kv", "proj", "sr", "norm"}
    assert keys(variant="e_mhsa", sr_ratio=4) == {"q", "k", "v", "proj", "norm"}


@pytest.mark.parametrize(("variant", "sr_ratio"), CHOICES)
def test_dropout_of_weights_and_output_in_training_only(variant, sr_ratio):
    x = torch.randn(2, 6, 6, 32)
    for dropout in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        block = FullAttention(32, variant=variant, sr_ratio=sr_ratio, **dropout)
        assert not torch.equal(block(x), block(x))
        assert torch.equal(block.eval()(x), block(x))


def test_attention_map_is_the_row_of_weights():
    block = randomised(FullAttention(8, 2))
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    seen = block.attention_map(x, (2, 1))
    q, k, _ = block.qkv(x.flatten(1, 2)).reshape(2, 15, 3, 2, 4).permute(2, 0, 3, 1, 4)
    wanted = (q @ k.mT / 2).softmax(-1)[:, :, 11]
    torch.testing.assert_close(seen, wanted.reshape(2, 2, 3, 5))
    for wrong in ((3, 0), (0,), (-1, 0)):
        with pytest.raises(ValueError, match="index into the map"):
            block.attention_map(x, wrong)
    with pytest.raises(ValueError, match="sr_ratio=1"):
        FullAttention(8, 2, variant="pvt", sr_ratio=2).attention_map(x.float(), (0, 0))


@pytest.mark.parametrize(
    "settings",
    [{"num_heads": 5}, {"variant": "swin"}, {"sr_ratio": 0}, {"sr_ratio": 2}, {"rank": 4}, {"attn_drop": 1.0}],
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FullAttention(32, **settings)


@pytest.mark.parametrize(("sizes", "kernel"), [((9,), 3), ((4, 5), (3, 5)), ((2, 3, 4), 3)])
def test_depthwise_convolution_mixes_positions_of_one_channel(sizes, kernel):
    block = DepthwiseConvolution(3, kernel_size=kernel, rank=len(sizes)).double()
    x = torch.randn(2, *sizes, 3, dtype=torch.float64)
    moved = x.clone()
    moved[..., 1] += torch.randn(*sizes, dtype=torch.float64)
    change = (block(moved) - block(x)).abs().flatten(0, -2).amax(0)
    assert change[1] > 0
    assert change[[0, 2]].max() == 0
    reach = [size // 2 for size in block.conv.kernel_size]
    centre = tuple(size // 2 for size in sizes)
    want = block.conv.bias.detach().clone()
    for offset in np.ndindex(*block.conv.kernel_size):
        at = [c + o - r for c, o, r in zip(centre, offset, reach, strict=True)]
        if all(0 <= a < size for a, size in zip(at, sizes, strict=True)):
            want = want + x[(0, *at)] * block.conv.weight[(slice(None), 0, *offset)]
    torch.testing.assert_close(block(x)[(0, *centre)], want)
    with pytest.raises(ValueError, match="odd"):
        DepthwiseConvolution(3, kernel_size=4)


def test_identity_gives_back_what_it_gets():
    x = torch.randn(2, 3, 4, 5)
    assert Identity(5)(x) is x
