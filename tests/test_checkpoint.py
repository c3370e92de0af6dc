import enum
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import visattn.networks
from visattn.checkpoint import (
    FORMAT,
    KEY,
    build_network,
    checkpoint_metadata,
    export_weights,
    plain,
    read_checkpoint,
)
from visattn.errors import UserError


class Tiny(nn.Module):
    def __init__(self, in_channels=3, classes=1, width=5, pretrained=False):
        super().__init__()
        assert pretrained is False
        self.body = nn.Conv2d(in_channels, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, classes, 1)


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    def create_model(name, **kwargs):
        assert name == "tiny"
        return Tiny(**kwargs)

    monkeypatch.setattr(visattn.networks, "create_model", create_model, raising=False)


def entry(**changes):
    content = checkpoint_metadata(
        recipe={"seed_everything": 3, "trainer": {"max_epochs": 2}},
        labels={"labels": {"background": 0, "polyp": 255}, "regions": {}, "ignore": []},
        preprocessing={"size": (8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "channels": 3},
        network={"name": "tiny", "in_channels": 3, "classes": 1, "width": 7, "pretrained": "weights.pth"},
        data={"description": "phantom (embedded, synthetic)", "fingerprint": "ab12"},
    )
    return content | changes


def write(path, **changes):
    torch.manual_seed(0)
    state = {f"network.{key}": value for key, value in Tiny(width=7).state_dict().items()}
    content = {"state_dict": state | {"loss.weight": torch.ones(2)}, "epoch": 1, KEY: entry()} | changes
    torch.save(content, path)
    return path


def refused(path):
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert path.name in message
    assert 2 <= len(message.splitlines()) <= 6 or "cannot" in message
    return message


def test_round_trip(tmp_path):
    checkpoint = read_checkpoint(write(tmp_path / "best.ckpt"))
    assert checkpoint.recipe == {"seed_everything": 3, "trainer": {"max_epochs": 2}}
    assert checkpoint.preprocessing["size"] == [8, 8]
    assert checkpoint.network["pretrained"] is False
    assert checkpoint.postprocessing == {"threshold": 0.5}
    assert str(torch.__version__).startswith(checkpoint.versions["torch"])
    assert checkpoint.metadata == entry()
    assert sorted(checkpoint.state_dict) == sorted(Tiny(width=7).state_dict()), "other modules' weights stay out"

    network = build_network(checkpoint)
    torch.manual_seed(0)
    expected = Tiny(width=7)
    assert not network.training
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=0, atol=0)


def test_run_folder_means_its_best_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    written = write(tmp_path / "checkpoints" / "best.ckpt")
    assert read_checkpoint(tmp_path).path == written
    written.unlink()
    assert "checkpoints/best.ckpt" in refused(tmp_path)


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "best.ckpt")
    assert str(tmp_path / "best.ckpt") in refused(tmp_path / "bset.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.99, 0.9999])
def test_truncated(tmp_path, share):
    path = write(tmp_path / "best.ckpt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    message = refused(path)
    assert "truncated" in message or "empty" in message or "not a visattn" in message


def test_flipped_bit_in_the_weights(tmp_path):
    path = write(tmp_path / "best.ckpt")
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if "/data/" in i.filename)
    data = bytearray(path.read_bytes())
    position = data.index(torch.ones(1).numpy().tobytes(), info.header_offset) + 1
    data[position] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # the reason for our own check: torch does not notice
    assert "damaged" in refused(path)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickle_payload_never_runs(tmp_path):
    for name, kind in {"zip.ckpt": True, "legacy.ckpt": False}.items():
        path, target = tmp_path / name, tmp_path / f"{name}-ran"
        content = {KEY: entry(), "state_dict": {}, "callbacks": Payload(target)}
        torch.save(content, path, _use_new_zipfile_serialization=kind)
        message = refused(path)
        assert not target.exists()
        assert "refused" in message if kind else "not a visattn checkpoint" in message
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps(Payload(tmp_path / "bare-ran")))
    refused(bare)
    assert not (tmp_path / "bare-ran").exists()
    torch.load(tmp_path / "zip.ckpt", weights_only=False)  # the payload is real
    assert (tmp_path / "zip.ckpt-ran").is_dir()


def test_compressed_archive(tmp_path):
    path = write(tmp_path / "best.ckpt")
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
        target.writestr("archive/data/99", bytes(50_000_000))
    assert "compressed" in refused(bomb)


def test_weights_that_claim_more_than_the_file(tmp_path):
    huge = torch.zeros(1).expand(1 << 40)
    path = write(tmp_path / "best.ckpt", state_dict={"network.body.weight": huge})
    assert "claim" in refused(path)


def test_metadata_that_unfolds_without_end(tmp_path):
    value: object = "x"
    for _ in range(40):
        value = [value, value]
    assert "too large" in refused(write(tmp_path / "a.ckpt", **{KEY: entry(recipe={"a": value})}))
    value = "x"
    for _ in range(100):  # deeper ones torch cannot even write
        value = [value]
    assert "too deep" in refused(write(tmp_path / "b.ckpt", **{KEY: entry(recipe={"a": value})}))


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {"backbone.conv1.weight": torch.ones(1)}}, {"model": 1}, [1, 2], torch.ones(3), {KEY: entry()}],
)
def test_another_tools_checkpoint(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    message = refused(tmp_path / "other.ckpt")
    assert "not a visattn checkpoint" in message or "state_dict" in message


def test_another_format_version(tmp_path):
    message = refused(write(tmp_path / "a.ckpt", **{KEY: entry(format=FORMAT + 1)}))
    assert "newer visattn" in message
    assert "pip install" in message
    for value in (None, "1", True):
        assert "format number" in refused(write(tmp_path / "b.ckpt", **{KEY: entry(format=value)}))


@pytest.mark.parametrize("key", ["task", "recipe", "labels", "preprocessing", "network", "versions", "data"])
def test_missing_key(tmp_path, key):
    content = entry()
    del content[key]
    assert f"'{key}' is missing" in refused(write(tmp_path / "a.ckpt", **{KEY: content}))
    assert f"'{key}' is not" in refused(write(tmp_path / "a.ckpt", **{KEY: entry(**{key: 3})}))


def test_weights_of_another_network(tmp_path):
    state = {f"network.{key}": value for key, value in Tiny(width=6).state_dict().items()}
    checkpoint = read_checkpoint(write(tmp_path / "swapped.ckpt", state_dict=state))
    with pytest.raises(UserError, match=r"swapped\.ckpt: the weights are not .* 0 missing, 0 unknown, 7 of another"):
        build_network(checkpoint)
    del state["network.head.bias"]
    with pytest.raises(UserError, match="1 missing"):
        build_network(read_checkpoint(write(tmp_path / "swapped.ckpt", state_dict=state)))


@pytest.mark.parametrize("value", ["hf-hub:someone/model", "local-dir:/tmp/model", "../model"])
def test_network_from_outside_is_refused(tmp_path, value):
    network = entry()["network"] | {"backbone": value}
    with pytest.raises(UserError, match="outside address"):
        build_network(read_checkpoint(write(tmp_path / "a.ckpt", **{KEY: entry(network=network)})))


class Colour(enum.StrEnum):
    RED = "red"


def test_metadata_is_plain():
    copy = plain({"a": (1, np.float64(0.5)), "b": Colour.RED, "v": torch.__version__, "n": None}, "recipe")
    assert copy == {"a": [1, 0.5], "b": "red", "v": str(torch.__version__), "n": None}
    assert type(copy["b"]) is type(copy["v"]) is str
    assert type(copy["a"][1]) is float
    for value in (torch.ones(1), Path("a"), np.int64(3), {3}, object()):
        with pytest.raises(TypeError, match=r"recipe\.data\[0\]"):
            plain({"data": [value]}, "recipe")
    with pytest.raises(TypeError, match="key 0 is not text"):
        plain({0: 1}, "recipe")


def test_export_and_read_back(tmp_path):
    source = write(tmp_path / "best.ckpt")
    written, beside = export_weights(source, tmp_path / "out" / "weights.safetensors")
    assert json.loads(beside.read_text())["network"]["name"] == "tiny"
    before, after = read_checkpoint(source), read_checkpoint(written)
    assert before.metadata == after.metadata
    assert before.state_dict.keys() == after.state_dict.keys()
    assert all(torch.equal(after.state_dict[key], value) for key, value in before.state_dict.items())
    build_network(after)

    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export_weights(source, tmp_path / "weights.pt")


def test_exported_pair_is_damaged(tmp_path):
    written, beside = export_weights(write(tmp_path / "best.ckpt"), tmp_path / "weights.safetensors")
    data, text = written.read_bytes(), beside.read_text()

    written.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "checksums differ" in refused(written)
    written.write_bytes(data[: len(data) // 2])
    assert "truncated" in refused(written)
    written.write_bytes(data)
    beside.write_text(text[:50])
    for broken in (text[:50], "[" * 100_000):
        beside.write_text(broken)
        with pytest.raises(UserError, match=r"weights\.json: damaged: not JSON"):
            read_checkpoint(written)
    beside.write_text(text.replace('"format": 1', '"format": 2'))
    assert "newer visattn" in refused(written)
    beside.unlink()
    assert "not beside it" in refused(written)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about loader workers and torch's pytree
def test_lightning_writes_what_we_read(tmp_path):
    import lightning.pytorch as pl

    from visattn.checkpoint_io import AtomicCheckpointIO

    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Tiny(width=7)

        def training_step(self, batch, index):
            return self.network.head(self.network.body(batch)).mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.ones(2, 3, 4, 4))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

        def on_save_checkpoint(self, checkpoint):
            checkpoint[KEY] = entry()

    def trainer(epochs):
        return pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[pl.callbacks.ModelCheckpoint(tmp_path, filename="last")],
            plugins=[AtomicCheckpointIO()],
        )

    torch.manual_seed(0)
    first = trainer(1)
    first.fit(Task())
    written = tmp_path / "last.ckpt"
    build_network(read_checkpoint(written))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    resumed = trainer(2)
    resumed.fit(Task(), ckpt_path=written)
    assert resumed.global_step == 4

    torch.save({"callbacks": Payload(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="refused"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_a_failing_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    from visattn.checkpoint_io import AtomicCheckpointIO

    plugin, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    plugin.save_checkpoint({"epoch": 1}, path)
    again = path.read_bytes()
    plugin.save_checkpoint({"epoch": 1}, path)
    assert path.read_bytes() == again, "equal content gives equal files"

    def half(content, handle):
        handle.write(b"PK half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UserError, match=r"(?s)last.ckpt.*No space.*it is whole"):
        plugin.save_checkpoint({"epoch": 2}, path)
    assert path.read_bytes() == again
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
