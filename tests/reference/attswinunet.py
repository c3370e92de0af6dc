"""Att-SwinU-Net with cross-contextual attention on all skips, as a plain function of its official state dict.

The exchange between decoder and skip is left to the caller, so that the official outputs of the whole network test it.
Sizes are the official ones: 224 x 224, dims 96 to 768, window 7.
"""

import torch
import torch.nn.functional as F

WINDOW = 7


def layer_norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def windows(x):
    """x (B, H, W, C) -> (B, H/7, W/7, 49, C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels).transpose(2, 3)
    return x.reshape(batch, height // WINDOW, width // WINDOW, WINDOW**2, channels)


def position_bias(table):
    """(heads, 49, 49) from the official table (169, heads)."""
    at = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None] + WINDOW - 1  # query minus key
    return table[offset[0] * (2 * WINDOW - 1) + offset[1]].permute(2, 0, 1)


def swin_block(x, state, name, heads, shift):
    """x (B, H, W, C)."""
    height, width = x.shape[1:3]
    shift = 0 if height <= WINDOW else shift
    tokens = layer_norm(x, state, f"{name}.norm1").roll((-shift, -shift), (1, 2))
    parts = windows(tokens)  # (B, h, w, 49, C)
    qkv = linear(parts, state, f"{name}.attn.qkv").reshape(*parts.shape[:-1], 3, heads, -1).movedim(-3, 0)
    q, k, v = qkv.transpose(-2, -3)  # (B, h, w, heads, 49, d)
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits = logits + position_bias(state[f"{name}.attn.relative_position_bias_table"])
    if shift:
        # After the roll the last window of an axis holds two regions that are no neighbours.
        region = torch.zeros(height)
        region[-WINDOW:-shift], region[-shift:] = 1, 2
        label = windows((region[:, None] * 3 + region)[None, :, :, None])[..., 0]  # (1, h, w, 49)
        apart = label[..., None] != label[..., None, :]
        logits = logits - 100.0 * apart[:, :, :, None]
    out = (logits.softmax(-1) @ v).transpose(-2, -3).flatten(-2)
    out = linear(out, state, f"{name}.attn.proj")
    out = out.reshape(x.shape[0], height // WINDOW, width // WINDOW, WINDOW, WINDOW, -1)
    out = out.transpose(2, 3).reshape(x.shape).roll((shift, shift), (1, 2))
    x = x + out
    hidden = F.gelu(linear(layer_norm(x, state, f"{name}.norm2"), state, f"{name}.mlp.fc1"))
    return x + linear(hidden, state, f"{name}.mlp.fc2")


def stage(x, state, name, depth):
    heads = x.shape[-1] // 32
    for number in range(depth):
        x = swin_block(x, state, f"{name}.blocks.{number}", heads, WINDOW // 2 * (number % 2))
    return x


def merge(x, state, name):
    parts = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return linear(layer_norm(torch.cat(parts, dim=-1), state, f"{name}.norm"), state, f"{name}.reduction")


def expand(x, state, name, factor=2):
    x = linear(x, state, f"{name}.expand")
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, factor, factor, channels // factor**2).transpose(2, 3)
    return layer_norm(x.reshape(batch, height * factor, width * factor, -1), state, f"{name}.norm")


def forward(image, state, cross):
    """Every stored output, by name.

    Args:
        image: (B, 1 or 3, 224, 224).
        state: The official entries.
        cross: Called with the level (2 is the deepest), the decoder's features and the skip, (B, H, W, C) each; returns
            both after the exchange.
    """
    outputs, skips = {}, []
    image = image.expand(-1, 3, -1, -1)
    name = "encoder.patch_embed"
    x = F.conv2d(image, state[f"{name}.proj.weight"], state[f"{name}.proj.bias"], stride=4).movedim(1, -1)
    x = layer_norm(x, state, f"{name}.norm")
    for number, depth in enumerate((2, 2, 6, 2)):
        skips.append(x)
        x = stage(x, state, f"encoder.layers.{number}", depth)
        outputs[f"enc_stage{number + 1}"] = x.movedim(-1, 1)
        if number < 3:
            x = merge(x, state, f"encoder.layers.{number}.downsample")
    x = expand(layer_norm(x, state, "encoder.norm"), state, "decoder.layers_up.0")
    outputs["dec_up0"] = x.movedim(-1, 1)
    for number, depth in ((1, 6), (2, 2), (3, 2)):
        level = 3 - number
        ours, theirs = cross(level, x, skips[level])
        first = torch.stack([ours[:, 0, 0], theirs[:, 0, 0]], dim=1)
        outputs[f"cca{level}_first_tokens"] = first
        x = linear(torch.cat([ours, theirs], dim=-1), state, f"decoder.concat_back_dim.{number}")
        x = stage(x, state, f"decoder.layers_up.{number}", depth)
        if number < 3:
            x = expand(x, state, f"decoder.layers_up.{number}.upsample")
        outputs[f"dec_up{number}"] = x.movedim(-1, 1)
    x = expand(layer_norm(x, state, "decoder.norm_up"), state, "decoder.up", 4)
    outputs["logits"] = F.conv2d(x.movedim(-1, 1), state["decoder.output.weight"])
    return outputs
