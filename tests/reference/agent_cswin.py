"""Agent-CSwin's forward pass on the authors' own state dict, one strip and one head at a time.

Written from the description in the golden notes, with the authors' names of the entries; blocks with agents are left to
`agent.py`'s loops.
"""

import torch
import torch.nn.functional as F


def block_entries(state, prefix):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def norm(x, state, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def attend(q, k, v, heads, kernel, offset):
    """Queries, keys and values (H, W, C) of one strip."""
    height, width, channels = q.shape
    each = channels // heads
    out = torch.zeros_like(v)
    for head in range(heads):
        part = slice(head * each, (head + 1) * each)
        a, b, c = (x[..., part].reshape(-1, each) for x in (q, k, v))
        weights = (a @ b.T / each**0.5).softmax(-1)
        out[..., part] = (weights @ c).reshape(height, width, each)
    local = F.conv2d(v.movedim(-1, 0)[None], kernel, offset, padding=1, groups=channels)
    return out + local[0].movedim(0, -1)


def strips(x, state, heads, thickness):
    """A block's attention without agents on one map (H, W, C); `thickness` (rows, columns), None for one whole map."""
    height, width, channels = x.shape
    q, k, v = linear(x, state, "qkv").split(channels, -1)
    out = torch.zeros_like(x)
    branches = 1 if thickness is None else 2
    share = channels // branches
    for branch in range(branches):
        rows, columns = height, width
        if thickness is not None:
            rows, columns = (height, thickness[1]) if branch == 0 else (thickness[0], width)
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                at = slice(top, top + rows), slice(left, left + columns), slice(branch * share, (branch + 1) * share)
                kernel, offset = (state[f"attns.{branch}.get_v.{name}"] for name in ("weight", "bias"))
                out[at] = attend(q[at], k[at], v[at], heads // branches, kernel, offset)
    return linear(out, state, "proj")


def stages(image, state, depths, heads, agents, thickness, agent_strips):
    """Maps (H, W, C) after each stage, and the logits, of one image (C, H, W).

    `agents` per stage are squares, or 0 for stages without; `agent_strips` is `agent.py`'s function.
    """
    maps = []
    x = image[None]
    for stage, depth in enumerate(depths):
        conv, after = ("stage1_conv_embed.0", "stage1_conv_embed.2") if stage == 0 else (
            f"merge{stage}.conv", f"merge{stage}.norm")  # fmt: skip
        how = {"stride": 4, "padding": 2} if stage == 0 else {"stride": 2, "padding": 1}
        x = F.conv2d(x, state[f"{conv}.weight"], state[f"{conv}.bias"], **how)[0].movedim(0, -1)
        x = norm(x, state, after)
        for index in range(depth):
            own = block_entries(state, f"stage{stage + 1}.{index}.")
            y = norm(x, own, "norm1")
            if agents[stage]:
                side = round(agents[stage] ** 0.5)
                mixed = agent_strips(y, own, heads[stage], (side, side), None, True).reshape(y.shape)
            else:
                mixed = strips(y, own, heads[stage], None if stage == len(depths) - 1 else thickness)
            x = x + mixed
            x = x + linear(F.gelu(linear(norm(x, own, "norm2"), own, "mlp.fc1")), own, "mlp.fc2")
        maps.append(x)
        x = x.movedim(-1, 0)[None]
    last = norm(maps[-1], state, "norm")
    return maps, linear(last.mean((0, 1)), state, "head")
