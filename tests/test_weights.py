"""Weights from files: taken completely or not at all, and nothing in them is executed."""

import argparse
import codecs
import datetime
import os
import pickle
import socket
import sys
import types

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import visattn.networks.features as features
from visattn.errors import UserError
from visattn.networks import create_model
from visattn.weights import OFFICIAL, load_official, official_backbones, read_weights, unwrap


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


# Reading


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_files_are_read(tmp_path, suffix):
    state = {"a.weight": torch.randn(2, 3), "a.bias": torch.zeros(2)}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    for given in (path, str(path)):
        read = read_weights(given)
        assert read.keys() == state.keys()
        assert torch.equal(read["a.weight"], state["a.weight"])


def test_files_of_old_torch_are_read(tmp_path):
    """The authors' checkpoints of 2020 are no zip archives."""
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pth")["a"], torch.ones(3))


@pytest.mark.parametrize("old", [False, True])
def test_a_payload_is_refused_and_not_run(tmp_path, old):
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    state = {"state_dict": {"a": torch.ones(3)}, "hook": Payload(str(trace))}
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(UserError, match="could execute code when loaded: refused"):
        read_weights(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists(), "the payload is none, so this test cannot fail"


def test_a_plain_pickle_is_refused(tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Payload(str(trace))))
    with pytest.raises(UserError, match=r"weights\.pth"):
        read_weights(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "text"])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    state = {"a": torch.randn(200, 50)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "truncated": data[: len(data) // 2], "noise": os.urandom(999), "text": b"hello\n"}[damage]
    )
    with pytest.raises(UserError) as error:
        read_weights(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_files_that_hold_something_else(tmp_path):
    with pytest.raises(UserError, match="no such weights file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(UserError, match="no such weights file"):
        read_weights(tmp_path)
    for content in (torch.ones(3), [1, 2], {}, {"state_dict": {}}, {"a": 1}, {"a": torch.ones(1), "b": "text"}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=r"odd\.pth"):
            read_weights(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": {"a": torch.ones(1)}},
        {"epoch": 1, "model": {"a": torch.ones(1)}, "optimizer": {"lr": 1.0}},
        {"model": {"state_dict": {"module.a": torch.ones(1)}}},
        {"module.a": torch.ones(1)},
        {"_orig_mod.module.a": torch.ones(1)},
        {"a": torch.ones(1).numpy()},
        {"epoch": 1, "model_ema": {"module.a": torch.ones(1)}},
        {"state_dict_ema": {"a": torch.ones(1)}, "epoch": 1},
        {"model_ema": {"a": torch.zeros(1)}, "model": {"a": torch.ones(1)}},
    ],
)
def test_wrappings(wrapped):
    assert unwrap(wrapped) == {"a": torch.ones(1)}


def test_a_prefix_of_some_keys_is_part_of_their_name():
    assert unwrap({"module.a": torch.ones(1), "b": torch.ones(1)}).keys() == {"module.a", "b"}


def test_official_names_are_checked_and_paths_accepted(tmp_path):
    with pytest.raises(UserError, match="Did you mean 'pranet'"):
        load_official("pra-net", {})
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: resnet\.conv1\.0\.weight"):
        load_official("pranet", tmp_path / "w.pth")
    assert set(OFFICIAL) == {"agunet", "att_swin_unet", "daunet", "pranet"}


def test_weights_under_our_names_are_told_from_the_authors():
    ours = timm.create_model("va_mobilenetv2_ela_l", width_mult=0.25).state_dict()
    with pytest.raises(UserError, match=r"names are ours, not the authors'.*checkpoint_path="):
        load_official("va_mobilenetv2_ela_l", ours, width_mult=0.25)
    ours.popitem()
    with pytest.raises(UserError, match="Give the authors' checkpoint, whole"):
        load_official("va_mobilenetv2_ela_l", ours, width_mult=0.25)


def test_the_classifier_may_be_left_out():
    """A backbone without classes takes a checkpoint that has them, checked like any other entry."""
    plan = {"dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    model = timm.create_model("va_nat_mini", num_classes=3, **plan).eval()
    state = {official_backbones()["va_nat_mini"].official_name(key): value for key, value in model.state_dict().items()}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.equal(load_official("va_nat_mini", state, num_classes=0, **plan)(x), features)
    maps = load_official("va_nat_mini", state, num_classes=0, features_only=True, **plan)
    assert len(maps(x)) == 4
    for wrong in (torch.ones(2), torch.tensor(1.0)):
        for settings in ({}, {"num_classes": 0}, {"features_only": True}):
            with pytest.raises(UserError, match=r"head\.weight"):
                load_official("va_nat_mini", {**state, "head.weight": wrong}, **settings, **plan)
    with pytest.raises(UserError, match=r"unexpected: head\.scale"):
        load_official("va_nat_mini", {**state, "head.scale": torch.ones(1)}, num_classes=0, **plan)


def test_backbones_with_official_weights_name_their_paper():
    assert [name for name in official_backbones() if not timm.get_pretrained_cfg(name).paper_ids] == []


class CfgNode(dict):
    """Settings as the library yacs keeps them, saved under its name."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen = True


@pytest.mark.parametrize("old", [False, True])
def test_what_authors_save_beside_weights_is_passed_over(tmp_path, monkeypatch, old):
    """Scores of NumPy and settings: a stand-in is made of them, and nothing is imported for it."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = CfgNode
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    beside = {"config": CfgNode(MODEL=CfgNode(DEPTHS=[1, 2])), "args": argparse.Namespace(lr=[0.1])}
    scores = {"best": np.float64(0.5), "epoch": np.int64(3), "all": [np.float32(1)]}
    file = tmp_path / "w.pth"
    torch.save({"model": {"a": torch.ones(1)}, **beside, **scores}, file, _use_new_zipfile_serialization=not old)
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert read_weights(file) == {"a": torch.ones(1)}
    assert "yacs.config" not in sys.modules
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)  # the permission ended with the reading


@pytest.mark.parametrize("codec", ["Puny-Code", "punycode", "\u00e9punycode", "IDNA\u2460"])
def test_a_text_that_takes_ages_to_encode_is_refused(tmp_path, codec):
    class Slow:
        def __reduce__(self):
            return codecs.encode, ("\u0101" * 9, codec)

    torch.save({"model": {"a": torch.ones(1)}, "x": Slow()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="refused"):
        read_weights(tmp_path / "w.pth")


def test_the_refusal_of_objects_says_how_to_go_on(tmp_path):
    """The advice, followed, gives a file that is read."""
    file, new = tmp_path / "w.pth", tmp_path / "new.pth"
    torch.save({"model": {"a": torch.ones(1)}, "date": datetime.date(2026, 1, 2)}, file)
    with pytest.raises(UserError, match="refused") as caught:
        read_weights(file)
    advice = str(caught.value).split("alone: ")[1]
    eval(advice, {"torch": torch, "FILE": file, "NEW": new})
    assert read_weights(new) == {"a": torch.ones(1)}


# Backbones from a file

BACKBONES = ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050"]


def whole_model(name, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=1000, **kwargs)
    for tensor in [*model.parameters(), *model.buffers()]:  # so that no entry has its initial value
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.1, 1)
    return model


@pytest.mark.parametrize(("name", "suffix"), list(zip(BACKBONES, [".safetensors", ".pth"] * 2, strict=True)))
def test_every_entry_comes_from_the_file(tmp_path, name, suffix):
    state = whole_model(name).state_dict()
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state}, path)
    net = create_model("pranet", backbone=name, pretrained=str(path), channels=4).backbone.net
    plain = {features._plain(key): value for key, value in state.items()}
    for key, value in net.state_dict().items():
        assert torch.equal(value, plain[features._plain(key)]), key


@pytest.mark.parametrize(("name", "in_channels"), [("resnet10t", 1), ("resnet10t", 5), ("convnext_atto", 2)])
def test_the_first_convolution_is_adapted_as_timm_does(tmp_path, name, in_channels):
    state = whole_model(name).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    net = create_model(
        "pranet", backbone=name, pretrained=tmp_path / "w.safetensors", in_channels=in_channels, channels=4
    ).backbone.net
    theirs = timm.create_model(
        name, pretrained=True, features_only=True, in_chans=in_channels, pretrained_cfg_overlay={"state_dict": state}
    ).state_dict()
    for key, value in net.state_dict().items():
        assert torch.equal(value, theirs[key]), key


def test_features_alone_are_taken_too(tmp_path):
    first = create_model("pranet", backbone="convnext_atto", channels=4).backbone.net
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    second = create_model("pranet", backbone="convnext_atto", pretrained=tmp_path / "w.safetensors", channels=4)
    assert all(torch.equal(v, second.backbone.net.state_dict()[k]) for k, v in first.state_dict().items())


def test_the_weights_file_may_lack_the_classifier(tmp_path):
    state = {k: v for k, v in whole_model("resnet10t").state_dict().items() if not k.startswith("fc.")}
    save_file(state, tmp_path / "w.safetensors")
    net = create_model("pranet", backbone="resnet10t", pretrained=tmp_path / "w.safetensors", channels=4).backbone.net
    assert torch.equal(net.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("layer3.0.conv1.weight"), "layer3.0.conv1.weight"),
        (lambda s: s.pop("layer2.0.bn1.running_mean"), "layer2.0.bn1.running_mean"),
        (lambda s: s.update({"layer9.weight": torch.ones(1)}), "layer9.weight"),
        (lambda s: s.update({"layer3.0.conv1.weight": torch.ones(3, 3, 3, 3)}), "layer3.0.conv1.weight"),
        (lambda s: s.update({"conv1.0.weight": torch.ones(24, 4, 3, 3)}), "conv1.0"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, text):
    state = whole_model("resnet10t").state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError) as error:
        create_model("pranet", backbone="resnet10t", pretrained=tmp_path / "w.pth", channels=4)
    assert "w.pth" in str(error.value)
    assert text in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_weights_of_another_backbone_are_refused(tmp_path):
    save_file(whole_model("resnet10t").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="not the weights of backbone 'convnext_atto'"):
        create_model("pranet", backbone="convnext_atto", pretrained=tmp_path / "w.safetensors", channels=4)


# Backbones from the hub, which a test cannot reach


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(address, timeout=None):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)


@pytest.mark.usefixtures("no_network")
def test_no_network_is_said_at_once():
    with pytest.raises(UserError) as error:
        create_model("pranet", pretrained=True)
    text = str(error.value)
    assert "cannot be reached to download 'res2net50d'" in text
    assert "Set pretrained: false, or pretrained: PATH" in text
    assert len(text.splitlines()) <= 6


@pytest.mark.usefixtures("no_network")
def test_a_backbone_without_weights():
    with pytest.raises(UserError, match="timm has no weights for"):
        create_model("pranet", backbone=NO_WEIGHTS, pretrained=True)


NO_WEIGHTS = next(name for name in timm.list_models("*resnet*") if not timm.is_model_pretrained(name))


def test_a_failing_download_is_explained(monkeypatch):
    def fail(*args, pretrained=False, **kwargs):
        raise RuntimeError("checksum mismatch\nand more lines")

    monkeypatch.setattr(features, "check_available", lambda name: None)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"weights of 'resnet10t' cannot be had \(RuntimeError: checksum mismatch\)"):
        create_model("pranet", backbone="resnet10t", pretrained=True)
