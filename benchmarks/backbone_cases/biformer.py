"""BiFormer against the official formulation, from its definition: permutes, windows, a gather from all windows."""

from attention import CASES as BLOCKS
from attention import load
from torch import Tensor, nn

from visattn.backbones.biformer import official_name


class OfficialLePE(nn.Module):
    """Full attention plus a depthwise convolution of the input, on tokens."""

    def __init__(self, dim: int, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, H, W, C)."""
        batch, height, width, dim = x.shape
        tokens = (batch, height * width, dim)
        local = self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(tokens)
        qkv = self.qkv(x.reshape(tokens)).reshape(batch, height * width, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(tokens) + local).reshape(x.shape)


class OfficialBlock(nn.Module):
    """Channels-first between blocks, channels-last inside."""

    def __init__(self, dim: int, attn: nn.Module, ratio: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(dim, ratio * dim), nn.Identity(), nn.GELU(), nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, C, H, W)."""
        x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


class OfficialBiFormer(nn.Module):
    """The published network, for the depths and widths given."""

    def __init__(self, depths: tuple[int, ...], widths: tuple[int, ...], topks: tuple[int, ...]) -> None:
        super().__init__()
        routed = load(BLOCKS, "bilevel").OfficialBiLevel

        def step(dim: int, dim_out: int) -> list[nn.Module]:
            return [nn.Conv2d(dim, dim_out, 3, 2, 1), nn.BatchNorm2d(dim_out)]

        half, last = widths[0] // 2, widths[-1]
        steps = [nn.Sequential(*step(3, half), nn.GELU(), *step(half, widths[0]))]
        steps += [nn.Sequential(*step(widths[i], widths[i + 1])) for i in range(3)]
        self.downsample_layers = nn.ModuleList(steps)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    OfficialBlock(dim, OfficialLePE(dim) if topk < 0 else routed(dim, dim // 32, topk), 3)
                    for _ in range(depth)
                )
            )
            for depth, dim, topk in zip(depths, widths, topks, strict=True)
        )
        self.norm, self.head = nn.BatchNorm2d(last), nn.Linear(last, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `x` (B, 3, H, W)."""
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return self.head(self.norm(x).flatten(2).mean(-1))


def official(model: nn.Module) -> nn.Module:
    """The official formulation with the weights of `model`, whose blocks are plain ones."""
    depths = tuple(len(stage.blocks) for stage in model.stages)
    widths = tuple(each["num_chs"] for each in model.feature_info)
    network = OfficialBiFormer(depths, widths, (1, 4, 16, -2))
    network.load_state_dict({official_name(key): value for key, value in model.state_dict().items()})
    return network


CASES = [
    ("va_biformer_tiny", {"drop_path_rate": 0.0}, official, (1.0, 1.6)),
    ("va_biformer_small", {"drop_path_rate": 0.0}, official, (1.0, 1.6)),
]
