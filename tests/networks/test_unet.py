"""U-Nets over the encoders of others: what comes out is as large as what goes in, and what can learn does."""

import pytest
import torch

from visattn.errors import UserError
from visattn.networks import create_model

# Reduction of the finest map and, where the model takes one size only, that size.
BACKBONES = {
    "convnext_atto": (4, None),
    "mambaout_femto": (4, None),  # its maps are channels-last
    "resnet10t": (2, None),
}
SLOW = {
    "volo_d1_224": (16, (224, 224)),
    "gcvit_xxtiny": (4, (224, 224)),
    "davit_tiny": (4, None),
    "swin_tiny_patch4_window7_224": (4, None),  # channels-last
    "swinv2_tiny_window8_256": (4, None),  # channels-last
    "efficientnet_b0": (2, None),
    "vit_tiny_patch16_224": (16, None),
    "vgg11_bn": (1, None),
    "levit_128s": (16, (224, 224)),
    "crossvit_tiny_240": (12, None),  # the next map is 17 times smaller than the image
    "sequencer2d_s": (7, None),
    "maxvit_rmlp_pico_rw_256": (2, None),  # windows want multiples of 256
    "hrnet_w18_small": (2, None),
}


@pytest.mark.parametrize("name", [*BACKBONES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_any_backbone_of_timm(name):
    torch.manual_seed(0)
    finest, only = {**BACKBONES, **SLOW}[name]
    network = create_model("unet", backbone=name, in_channels=2, classes=3)
    assert network.backbone.features[0][1] == finest
    assert network.backbone.fixed_size == only
    size = (37, 50) if only is None else (only[0] - 3, only[1])
    output = network.eval()(torch.randn(1, 2, *size))
    assert output.shape == (1, 3, *size)
    output.square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    if only is not None:
        with pytest.raises(UserError, match=f"images of {only[0]}x{only[1]} pixels only"):
            network(torch.randn(1, 2, only[0] + 1, only[1]))


@pytest.mark.parametrize("head", ["fpn", "upernet", "linear", "pranet"])
@pytest.mark.parametrize(
    "name", ["mambaout_femto", *(pytest.param(n, marks=pytest.mark.slow) for n in ("volo_d1_224", "crossvit_tiny_240"))]
)
def test_other_heads_read_the_same_maps(head, name):
    torch.manual_seed(0)
    size = (45, 60) if name == "mambaout_femto" else (224, 224)
    arguments = {"pranet": {"channels": 8}, "fpn": {"width": 16, "branch_width": 8}, "upernet": {"width": 16}}
    if (head, name) == ("pranet", "crossvit_tiny_240"):
        pytest.skip("it has two maps, and PraNet needs three")
    network = create_model(head, backbone=name, classes=2, **arguments.get(head, {})).eval()
    with torch.no_grad():
        output = network(torch.randn(1, 3, *size))
    assert (output if isinstance(output, torch.Tensor) else output[0]).shape == (1, 2, *size)


def test_the_coarsest_maps_alone():
    network = create_model("unet", backbone="resnet10t", maps=2, channels=[24], classes=2).eval()
    assert [reduction for _, reduction in network.backbone.features] == [16, 32]
    assert network.head.levels[0].width == 24
    assert network(torch.randn(1, 3, 40, 50)).shape == (1, 2, 40, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 4}, "dims must be 2 or 3, got 4"),
        ({"backbone": "resnet81"}, "Did you mean"),
        ({"backbone": "va_biformer_tiny", "dims": 3}, "gives no feature maps of volumes"),
        ({"backbone": "resnet10t", "maps": 9}, "maps"),
        ({"backbone": "resnet10t", "maps": 0}, "maps"),
        ({"backbone": "resnet10t", "backbone_args": {"img_size": 64}}, "does not take backbone_args"),
        ({"backbone": "resnet10t", "backbone_args": {"features_only": False}}, "is set by the network"),
        ({"backbone_args": {"attention": "neigborhood"}}, "Did you mean 'neighborhood'"),
        ({"skip": "conat"}, "Did you mean 'concat'"),
        ({"decoder": "halo_", "dims": 3}, "Did you mean 'halo'"),
        ({"upsample": "bilinear"}, "pixel_shuffle"),
        ({"norm": "layer"}, "batch, group, instance"),
        ({"channels": [8]}, "channels needs 3 whole numbers"),
        ({"channels": [8, 0, 8]}, "channels needs 3 whole numbers"),
        ({"depth": 0}, "depth"),
    ],
)
def test_what_cannot_be_is_told(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        create_model("unet", **arguments)
    assert len(str(caught.value).splitlines()) <= 6
    assert max(len(line) for line in str(caught.value).splitlines()) < 1000
