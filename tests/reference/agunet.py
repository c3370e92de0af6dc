"""AGUNet with input pyramid and deep supervision as a plain function of its official state dict, but for the gates.

The gates are left to the caller, so that the official outputs of the whole network test a gate. Layers are taken in the
order in which Keras numbered them, which is the order below.
"""

import torch
import torch.nn.functional as F


class Layers:
    """The official entries, handed out in Keras's order of creation, kind by kind."""

    def __init__(self, state):
        self.state, self.counts = state, {"conv3d": 0, "batch_normalization": 0, "conv3d_transpose": 0}

    def next(self, kind):
        number = self.counts[kind]
        self.counts[kind] += 1
        name = kind if number == 0 else f"{kind}_{number}"
        return {key[len(name) + 1 :]: value for key, value in self.state.items() if key.startswith(name + ".")}

    def conv(self, x):
        layer = self.next("conv3d")
        return F.conv3d(x, layer["kernel"], layer["bias"], padding=layer["kernel"].shape[-1] // 2)

    def norm(self, x):
        layer = self.next("batch_normalization")
        mean, variance = layer["running_mean"], layer["running_var"]
        return F.batch_norm(x, mean, variance, layer["gamma"], layer["beta"], eps=1e-3)

    def up(self, x):
        """Keras's transposed convolution with padding "same": the last index of each axis is dropped."""
        layer = self.next("conv3d_transpose")
        return F.conv_transpose3d(x, layer["kernel"], layer["bias"], stride=2)[..., :-1, :-1, :-1]

    def block(self, x):
        for _ in range(2):
            x = self.norm(self.conv(x)).relu()
        return x


def forward(x, state, levels, gate):
    """Every stored output, by name.

    Args:
        x: (B, 1, D, H, W).
        state: The official entries.
        levels: Number of filter entries.
        gate: Called with the decoder's features, the skip, and the gate's own official entries, in Keras's order: three
            of convolutions and three of norms. Returns the gated skip.
    """
    layers, image, skips, outputs = Layers(state), x, [], {}
    for level in range(levels - 1):
        if level:
            image = F.avg_pool3d(image, 2)
            x = torch.cat([layers.conv(image).relu(), x], dim=1)
        x = layers.block(x)
        skips.append(x)
        x = F.max_pool3d(x, 2)
    outputs["bottom"] = x = layers.block(x)
    for level in reversed(range(levels - 1)):
        x = layers.norm(layers.up(x)).relu()
        convs = [layers.next("conv3d") for _ in range(3)]
        norms = [layers.next("batch_normalization") for _ in range(3)]
        outputs[f"dec{level}"] = x = layers.block(torch.cat([x, gate(x, skips[level], convs, norms)], dim=1))
    for level in reversed(range(levels - 1)):  # heads are created last, the deepest first
        outputs[f"logit{level}"] = logits = layers.conv(outputs[f"dec{level}"])
        outputs[f"prob{level}"] = logits.softmax(1)
    return outputs
