"""PartialNet against the official formulation, written from its definition: channels-first throughout."""

from attention import CASES as BLOCKS
from attention import load
from torch import Tensor, nn

from visattn.backbones.partialnet import official_name

blocks = load(BLOCKS, "partial")


class OfficialBlock(nn.Module):
    """Mixing, then an MLP of 1x1 convolutions; in the last stage with a shortcut around the mixing."""

    def __init__(self, dim: int, act: type[nn.Module], pat_sp: bool, last: bool) -> None:
        super().__init__()
        rest = dim - dim // 4
        if last:
            attention, norm = blocks.Attention(rest, 4), blocks.LayerNorm(rest, eps=1e-6)
        else:
            attention, norm = blocks.Gate(rest), nn.BatchNorm2d(rest)
        self.spatial_mixing = blocks.OfficialPartial(dim, attention, norm, last)
        layers = [nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim), act()]
        layers.append(nn.Conv2d(2 * dim, dim, 1, bias=False))
        self.mlp = nn.Sequential(*layers, *([blocks.OfficialSpatial(dim)] if pat_sp else []))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, C, H, W)."""
        if self.last:
            x = x + self.spatial_mixing(x)
            return x + self.mlp(x)
        return x + self.mlp(self.spatial_mixing(x))


class Patches(nn.Module):
    """A convolution over patches and a norm, under the official name of the convolution."""

    def __init__(self, name: str, dim: int, dim_out: int, size: int) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Conv2d(dim, dim_out, size, stride=size, bias=False))
        self.norm = nn.BatchNorm2d(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """The coarser map."""
        return self.norm(self.get_submodule(self.name)(x))


class OfficialPartialNet(nn.Module):
    """The published network, without its dropout."""

    def __init__(self, depths: list[int], dim: int, act: type[nn.Module], pat_sp: bool) -> None:
        super().__init__()
        self.patch_embed = Patches("proj", 3, dim, 4)
        stages: list[nn.Module] = []
        for index, depth in enumerate(depths):
            width = dim * 2**index
            if index:
                stages.append(Patches("reduction", width // 2, width, 2))
            stage = nn.Module()
            stage.blocks = nn.Sequential(*(OfficialBlock(width, act, pat_sp, index == 3) for _ in range(depth)))
            stage.forward = stage.blocks.forward
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.avgpool_pre_head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8 * dim, 1280, 1, bias=False), act())
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x` (B, 3, H, W)."""
        x = self.patch_embed(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.avgpool_pre_head(x).flatten(1))


def official(model: nn.Module) -> nn.Module:
    """The official formulation with the weights of `model`."""
    state = {official_name(key): value for key, value in model.state_dict().items()}
    depths = [len(stage.blocks) for stage in model.stages]
    act = type(model.head.pre_logits.act)
    pat_sp = "stages.0.blocks.0.mlp.4.conv.weight" in state
    network = OfficialPartialNet(depths, model.feature_info[0]["num_chs"], act, pat_sp)
    network.load_state_dict(state)
    return network


PLAIN = {"drop_path_rate": 0.0, "attn_drop_rate": 0.0}
CASES = [
    ("va_partialnet_t0", PLAIN, official, (1.0, 1.0)),
    ("va_partialnet_t1", PLAIN, official, (1.0, 1.0)),
    ("va_partialnet_t2", PLAIN, official, (1.0, 1.0)),
    ("va_partialnet_s", PLAIN, official, (1.0, 1.0)),
]
