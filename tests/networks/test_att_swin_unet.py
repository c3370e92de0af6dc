"""Att-SwinU-Net against the golden cases of the official code, and what it does beyond them."""

import pytest
import torch
from torch import nn

import visattn
from visattn.attention import CrossContextualAttention
from visattn.errors import UserError
from visattn.networks.att_swin_unet import SwinBlock

CASES = {
    "swin_sa1_skip3": {"mode": "swin", "spatial_attention": "1", "skip_num": "3"},
    "cca_sa1_skip3": {"mode": "cross_contextual_attention", "spatial_attention": "1", "skip_num": "3"},
}

CROSSING = "cross_contextual_attention"


def outputs(network, x):
    """Every map that the golden cases hold, by its name there."""
    found = {}

    def keep(name):
        return lambda module, arguments, output: found.update({name: output.movedim(-1, 1)})

    def keep_first(name):
        return lambda module, arguments, output: found.update(
            {name: torch.stack([each[:, 0, 0] for each in output], dim=1)}
        )

    handles = [
        layer.blocks[-1].register_forward_hook(keep(f"enc_stage{i + 1}"))
        for i, layer in enumerate(network.encoder.layers)
    ]
    handles += [layer.register_forward_hook(keep(f"dec_up{i}")) for i, layer in enumerate(network.decoder.layers_up)]
    handles += [
        block.register_forward_hook(keep_first(f"cca{level}_first_tokens"))
        for level, block in network.decoder.Crossvit_layer.items()
    ]
    with torch.no_grad():
        found["logits"] = network(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("variant", CASES)
def test_every_stored_output(golden, variant):
    case = golden("attswinunet", variant)
    network = visattn.load_official("att_swin_unet", case.state_dict(), **CASES[variant])
    for index in case.cases:
        found = outputs(network, case.input(index))
        assert found.keys() == case.facts["cases"][index]["outputs"].keys()
        for name, value in found.items():
            assert case.error(index, name, value) <= 1, name


@pytest.mark.parametrize("variant", CASES)
def test_parameters_are_the_official_ones(golden, variant):
    case = golden("attswinunet", variant)
    network = visattn.load_official("att_swin_unet", case.state_dict(), **CASES[variant])
    unused = 96 * 4 * 4 * 4 + 3 * 96 + 2 * 768  # the outer patch embedding and the decoder's first norm
    assert sum(p.numel() for p in network.parameters()) + unused == case.facts["parameters"]


SETTINGS = [("swin", "3", "0"), ("swin", "0", "1"), *((CROSSING, number, "1") for number in "012")]


@pytest.mark.slow  # whole networks of 41 and 47 million parameters, and the definition of each beside
@pytest.mark.parametrize(("mode", "skip_num", "spatial_attention"), SETTINGS)
def test_every_setting_computes_its_definition(golden, reference, mode, skip_num, spatial_attention):
    """Settings that no stored case has, with another number of classes, in files with and without what is not used."""
    case = golden("attswinunet", "swin_sa1_skip3" if mode == "swin" else "cca_sa1_skip3")
    state = case.state_dict()
    state["decoder.output.weight"] = state["decoder.output.weight"][:2]
    crossed = [str(2 - i) for i in range(int(skip_num))] if mode == CROSSING else []

    def join(level, x, skip):
        if spatial_attention == "1" and mode == "swin":
            both, name = torch.cat([x, skip], dim=-1), f"decoder.concat_back_dim.{3 - level}"
            return nn.functional.linear(both, state[f"{name}.weight"], state[f"{name}.bias"]), skip
        if str(level) not in crossed:
            return x, skip
        own = {key.removeprefix(f"decoder.Crossvit_layer.{level}."): value for key, value in state.items()}
        streams = zip(x.flatten(1, 2), skip.flatten(1, 2), strict=True)
        pairs = [reference("cross_contextual").exchange(*each, own, 8, 2, "code") for each in streams]
        return tuple(
            torch.stack(found).reshape(like.shape)
            for found, like in zip(zip(*pairs, strict=True), (x, skip), strict=True)
        )

    x = case.input(0)
    with torch.no_grad():
        expected = reference("attswinunet").forward(x, state, join)
    settings = {"mode": mode, "skip_num": skip_num, "spatial_attention": spatial_attention}
    used = {
        key: value
        for key, value in state.items()
        if not key.startswith(("patch_embed.", "decoder.norm."))
        and (not key.startswith("decoder.Crossvit_layer.") or key.split(".")[2] in crossed)
    }
    for given in (state, used):
        network = visattn.load_official("att_swin_unet", given, **settings)
        found = outputs(network, x)
        assert found["logits"].shape == (1, 2, 224, 224)
        assert found.keys() == expected.keys() - {f"cca{i}_first_tokens" for i in range(3) if str(i) not in crossed}
        for name, value in found.items():
            assert (value - expected[name]).abs().max() <= 2e-5 * expected[name].std(), name


def test_fewer_crossing_levels_are_the_deepest(golden):
    state = golden("attswinunet", "cca_sa1_skip3").state_dict()
    network = visattn.load_official("att_swin_unet", state, **{**CASES["cca_sa1_skip3"], "skip_num": "2"})
    assert list(network.decoder.Crossvit_layer) == ["1", "2"]
    assert all(isinstance(each, CrossContextualAttention) for each in network.decoder.Crossvit_layer.values())


def test_settings_that_the_official_code_takes_for_none_are_refused(golden):
    state = golden("attswinunet", "cca_sa1_skip3").state_dict()
    with pytest.raises(UserError, match="as text"):
        visattn.load_official("att_swin_unet", state, mode="cross_contextual_attention", skip_num=3)
    with pytest.raises(UserError, match="mode"):
        visattn.load_official("att_swin_unet", state, mode="cca")
    del state["encoder.layers.2.blocks.5.mlp.fc2.weight"]
    with pytest.raises(UserError, match=r"missing: encoder\.layers\.2\.blocks\.5\.mlp\.fc2\.weight"):
        visattn.load_official("att_swin_unet", state, **CASES["cca_sa1_skip3"])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_size_and_channels(channels):
    torch.manual_seed(0)
    network = visattn.create_model("att_swin_unet", in_channels=channels, classes=2, img_size=64).eval()
    x = torch.randn(1, channels, 70, 97)
    with torch.no_grad():
        logits = network(x)
        assert logits.shape == (1, 2, 70, 97)
        # Zeros at the end are what the padding adds, and a size of 96 x 128 needs none.
        padded = network(nn.functional.pad(x, (0, 128 - 97, 0, 96 - 70)))
    torch.testing.assert_close(logits, padded[..., :70, :97])


@pytest.mark.parametrize("fusion", ["concat", "double_concat", "cross_contextual"])
def test_the_papers_variant_lets_the_encoder_guide(fusion):
    torch.manual_seed(0)
    network = visattn.create_model("att_swin_unet", img_size=32, fusion=fusion, variant="paper")
    x = torch.randn(1, 3, 64, 64)
    network.eval()
    with torch.no_grad():
        before = network(x)
        first = network.encoder.layers[1].blocks[1]
        assert isinstance(first, SwinBlock)
        # The keys of the encoder's block reach the decoder even where the encoder's own path is cut.
        for layer in network.encoder.layers:
            for block in layer.blocks:
                nn.init.zeros_(block.attn.proj.weight)
        cut = network(x)
        first.attn.qkv.weight[:96].mul_(-3)
        assert not torch.allclose(cut, network(x), atol=1e-6)
    assert not torch.allclose(before, cut, atol=1e-6)


def test_arguments_are_checked():
    for arguments in ({"fusion": "cat"}, {"variant": "officail"}, {"cross_levels": 4}, {"img_size": 0}):
        with pytest.raises(UserError):
            visattn.create_model("att_swin_unet", **arguments)
