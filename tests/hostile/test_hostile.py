"""Files and arguments made to harm: none executes, reaches out, leaves its folder, never ends or ends in a traceback.

Every attack goes through the command line in this process. The answer must be exit code 2, at most six lines that name
what is wrong, free of control characters; and nothing may have called the system, opened a connection, made the canary
or changed a file.
"""

import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visattn.data.expression
import visattn.networks
from visattn.checkpoint import KEY, checkpoint_metadata
from visattn.cli import main
from visattn.errors import UserError
from visattn.weights import load_official, read_weights

pytestmark = pytest.mark.timeout(60)


class Tiny(torch.nn.Module):
    def __init__(self, in_channels=3, classes=1, width=5, depth=1, pretrained=False, **_):
        super().__init__()
        self.body = torch.nn.Sequential(*(torch.nn.Conv2d(in_channels, width, 1) for _ in range(depth)))
        self.head = torch.nn.Conv2d(width, classes, 1)

    def forward(self, x):
        return self.head(self.body(x))


class Call:
    """What pickle turns into a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def attack(tmp_path, canary, monkeypatch, capfd):
    """Run the command line in an empty folder and look at everything but the answer, which is returned."""
    touched = []
    for key in [key for key in os.environ if "proxy" in key.lower()]:
        monkeypatch.delenv(key)
    monkeypatch.setattr(os, "system", lambda command: touched.append(command))
    start = subprocess.Popen.__init__

    def popen(self, words, *args, **kwargs):
        if "-I" in words:  # our own, which matches an expression
            return start(self, words, *args, **kwargs)
        touched.append(words)
        raise AssertionError(words)

    def connect(*args, **kwargs):
        touched.append(args)
        raise OSError("no network in a test")

    monkeypatch.setattr(subprocess.Popen, "__init__", popen)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(visattn.data.expression, "SECONDS", 1.0)
    monkeypatch.chdir(tmp_path)

    def listing():
        return {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_dir()}

    def run(*arguments, network=False, lines=6):
        before = listing()
        assert main([str(argument) for argument in arguments]) == 2
        error = capfd.readouterr().err.strip()
        assert error.startswith("visattn: error: ")
        assert len(error.splitlines()) <= lines, error
        assert all(line.isprintable() for line in error.splitlines()), ascii(error)
        assert "Traceback" not in error
        assert not canary.exists()
        assert network or not touched, touched
        assert listing() == before, "an attack that is refused writes nothing"
        return error

    return run


# Recipes

DEEP = "[" * 500 + "]" * 500
YAML = {
    "python tag": ("a: !!python/object/apply:os.system ['touch canary']", "tags"),
    "python name": ("a: !!python/name:os.system", "tags"),
    "binary": ("a: !!binary foo", "tags"),
    "broken timestamp": ("a: !!timestamp foo", "tags"),
    "broken bool": ("a: !!bool foo", "tags"),
    "empty int": ("a: !!int ''", "tags"),
    "billion laughs": ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
    "merge": ("<<: {model: 1}", "not valid YAML"),
    "deep": (f"a: {DEEP}", "too deeply"),
    "twice": ("model: 1\nmodel: 2", "stands twice"),
    "many digits": ("seed_everything: " + "9" * 5000, "number this long"),
    "hexadecimal": ("seed_everything: 0x" + "f" * 20000, "number this long"),
    "sexagesimal": ("seed_everything: " + ":".join(["59"] * 400) + ".5", "number this long"),
    "large": ("a: [" + "[]," * 300_000 + "]", "too many"),
    "nul": ('a: "x\\0y"', "NUL"),
    "line breaks": ('"a\\nb\\nc\\nd\\ne\\nf\\ng\\nh": 1', "unknown key"),
    "escape": ('"\\e[31mred\\e]0;title\\a": 1', "unknown key"),
    "right to left": ('"\\u202egnp": 1', "unknown key"),
    "half a character": ('"\\ud800": 1', "unknown key"),
    "binary file": ("\x00\x01", "not valid YAML"),
}


@pytest.mark.parametrize("case", YAML)
def test_yaml(case, attack, tmp_path):
    text, expected = YAML[case]
    (tmp_path / "r.yaml").write_text(text)
    assert expected in attack("fit", "--config", "r.yaml", "--print_config")


CLASS = "{class_path: os.system, init_args: {command: touch canary}}"
OVERRIDES = [
    *(("model.class_path", name) for name in ("os.system", "subprocess.Popen", "builtins.exec")),
    ("data.class_path", "os.system"),
    *((f"trainer.{key}", CLASS) for key in ("logger", "strategy", "profiler", "plugins", "callbacks", "accelerator")),
    ("trainer.callbacks", "[{class_path: subprocess.Popen, init_args: {args: [touch, canary]}}]"),
    ("trainer.callbacks", "[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.1, avg_fn: os.system}}]"),
    ("trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: val/loss, mode: os.system}}]"),
    ("trainer.callbacks", "[{class_path: Timer, init_args: {duration: os.system}}]"),
    ("trainer.plugins", "os.system"),
    ("trainer.plugins", "[subprocess.Popen]"),
    ("trainer.logger", "os.system"),
    ("trainer.strategy", "os.system"),
    ("trainer.accelerator", "os.system"),
    ("trainer.profiler", "os.system"),
    ("trainer.profiler", "xla"),
    ("trainer.devices", "99999999999999999999"),
    ("trainer.check_val_every_n_epoch", "0"),
    ("trainer.default_root_dir", "s3://bucket/runs"),
    ("trainer.default_root_dir", "memory://runs"),
    ("model.loss", "{name: os.system}"),
    ("model.loss", "{name: structure, pixel_weighted_bce: os.system}"),
    ("model.loss", "{name: structure, class_path: os.system}"),
    ("model.network", "{name: [1]}"),
    ("model.network", "{name: os.system}"),
    ("model.network", "{name: pranet, pretrained: [1]}"),
    ("model.network", "{name: pranet, backbone: 'hf-hub:someone/model'}"),
    ("model.network", "{name: pranet, backbone: 'local-dir:/tmp'}"),
    ("model.network", "{name: pranet, backbone: resnet10t, pretrained: 'http://example.com/w.pth'}"),
    ("model.network", "{name: pranet, backbone: resnet10t, pretrained: /dev/zero}"),
    ("model.network", "{name: pranet, backbone: resnet10t, backbone_args: 5}"),
    ("model.network", "{name: pranet, backbone: resnet10t, backbone_args: {act_layer: os.system}}"),
    ("model.network", "{name: pranet, backbone: resnet10t, backbone_args: {checkpoint_path: /etc/passwd}}"),
    ("model.network", "{name: pranet, backbone: resnet10t, backbone_args: {pretrained_cfg: {url: 'http://x.y/z'}}}"),
    ("model.init_from", "http://example.com/a.ckpt"),
    ("model.init_from", "/dev/zero"),
    ("model.optimizer.lr", ".nan"),
    ("model.optimizer.lr", "1e400"),
    ("model.optimizer.weight_decay", ".nan"),
    ("model.schedule", "{name: poly, power: -1e300}"),
    ("model.schedule", "{name: cosine, warmup_epochs: .nan}"),
    ("data.root", "http://example.com/data"),
    ("data.root", "s3://bucket/data"),
    ("data.root", "$HOME/nowhere"),
    ("data.root", "${oc.env:HOME}"),
    ("data.size", "1000000"),
    ("data.num_workers", "100000"),
    ("data.seed", "-1"),
    ("data.mean", "[.nan, 0, 0]"),
    ("data.augment", "[{name: os.system}]"),
    ("data.augment", "[{name: elastic, cells: 1000000000}]"),
    ("data.split", "{files: /dev/zero}"),
    ("data.split", "{files: /etc/passwd}"),
    ("data.split", "{folds: 1000000000}"),
    ("data.split", "{group_by: '/dev/zero.csv:a'}"),
    ("data.split", "{group_by: '^(([a-z0-9_]+)*)$!'}"),
]


@pytest.mark.parametrize(
    ("key", "value"),
    # The fast tests take one in six: each takes as long as Lightning needs to check a recipe.
    [pytest.param(*case, marks=[pytest.mark.slow] if i % 6 else []) for i, case in enumerate(OVERRIDES)],
)
def test_recipe_values(key, value, attack, polyps):
    root = [] if key == "data.root" else ["--data.root", polyps]
    small = ["--data.size", "32", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    error = attack("fit", "--config", "polyp_pranet", *root, *small, f"--{key}", value)
    section, *_, last = key.split(".")
    assert any(word in error for word in (key, last, section, "backbone", "weights file"))


@pytest.mark.parametrize("name", ["http://example.com/r.yaml", "s3://b/r.yaml", "memory://r.yaml", "/dev/zero", "/"])
def test_recipes_from_elsewhere(name, attack):
    assert f"--config {name}" in attack("fit", "--config", name)


@pytest.mark.slow
def test_backbone_weights_are_fetched_only_when_asked(attack, polyps):
    network = ["--model.network.backbone", "resnet10t", "--trainer.accelerator", "cpu"]
    config = ["fit", "--config", "polyp_pranet", "--data.root", polyps, *network]
    assert "cannot be reached" in attack(*config, "--model.network.pretrained", "true", network=True)


def test_an_expression_that_never_ends(attack, tmp_path):
    masks(tmp_path / "m", ["a" * 40])
    (tmp_path / "l.yaml").write_text("a: 0\nb: 255\n")
    command = ["evaluate", "m", "m", "--labels", "l.yaml", "--output", "o", "--group_by"]
    assert "more than 1 seconds" in attack(*command, "^((a+)+)$!".replace("((a+)+)", "((?:a+)+)"))
    assert "needs exactly one group" in attack(*command, "(.)(.)")
    assert "no regular expression" in attack(*command, "(")


# Checkpoints


def entry(**changes):
    content = checkpoint_metadata(
        recipe={"model": {"class_path": "os.system"}},
        labels={"labels": {"background": 0, "polyp": 255}, "regions": {}, "ignore": []},
        preprocessing={"size": (8, 8), "mean": (0.5,) * 3, "std": (0.2,) * 3, "channels": 3},
        network={"name": "tiny", "in_channels": 3, "classes": 1},
        data={"description": "phantom", "fingerprint": "00"},
    )
    return content | changes


def weights(**changes):
    torch.manual_seed(0)
    return {f"network.{key}": value for key, value in Tiny().state_dict().items()} | changes


def saved(path, state=None, more=None, **changes):
    torch.save({"state_dict": weights() if state is None else state, KEY: entry(**changes), **(more or {})}, path)


def network(**changes):
    return {**entry()["network"], **changes}


def rezipped(path, change):
    """The archive of an honest checkpoint, its entries changed."""
    saved(path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)


def _raw_pickle(*lines):
    return lambda entries: {
        name: b"".join(lines) if name.endswith("data.pkl") else data for name, data in entries.items()
    }


def _bytearray_bomb(path):
    rezipped(
        path, _raw_pickle(b"\x80\x02cbuiltins\nbytearray\n", b"\x8a\x06" + (10**12).to_bytes(6, "little"), b"\x85R.")
    )


def _link(path):
    path.symlink_to(path.name)


def _exported(path, **changes):
    from visattn.checkpoint import export_weights

    saved(path.with_suffix(".ckpt"))
    export_weights(path.with_suffix(".ckpt"), path)
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | changes))
    path.with_suffix(".ckpt").unlink()


def _header_bomb(path):
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    path.with_suffix(".json").write_text(json.dumps(entry()))


CANARY = "canary"
SYSTEM = os.system  # before it is watched
NAN = torch.full((5, 3, 1, 1), float("nan"))
CHECKPOINTS = {
    "system": lambda p: saved(p, more={"x": Call(SYSTEM, f"touch {CANARY}")}),
    "eval": lambda p: saved(p, more={"x": Call(eval, f"open('{CANARY}', 'w')")}),
    "exec": lambda p: saved(p, more={"x": Call(exec, f"open('{CANARY}', 'w')")}),
    "torch.load": lambda p: saved(p, more={"x": Call(torch.load, "other.ckpt")}),
    "torch.hub": lambda p: saved(p, more={"x": Call(torch.hub.load_state_dict_from_url, "http://example.com")}),
    "weights that call": lambda p: saved(p, state=weights(x=Call(SYSTEM, f"touch {CANARY}"))),
    "recipe that calls": lambda p: saved(p, recipe={"a": Call(SYSTEM, f"touch {CANARY}")}),
    "legacy": lambda p: torch.save({"x": Call(SYSTEM, "touch canary")}, p, _use_new_zipfile_serialization=False),
    "bare pickle": lambda p: p.write_bytes(pickle.dumps(Call(SYSTEM, f"touch {CANARY}"))),
    "pickle in zip": lambda p: rezipped(p, _raw_pickle(pickle.dumps(Call(SYSTEM, f"touch {CANARY}")))),
    "text opcodes": lambda p: rezipped(p, _raw_pickle(b"cos\nsystem\n(S'touch canary'\ntR.")),
    "a bytearray of a terabyte": _bytearray_bomb,
    "names that climb": lambda p: rezipped(p, lambda e: {f"../../{n}": d for n, d in e.items()} | {"../canary": b"x"}),
    "no numbers": lambda p: saved(p, state=weights(**{"network.body.0.weight": NAN})),
    "sparse": lambda p: saved(p, state=weights(**{"network.body.0.bias": torch.ones(5).to_sparse()})),
    "complex": lambda p: saved(p, state=weights(**{"network.body.0.bias": torch.ones(5, dtype=torch.complex64)})),
    "meta": lambda p: saved(p, state=weights(**{"network.body.0.bias": torch.ones(5, device="meta")})),
    "expanded": lambda p: saved(p, state={"network.body.0.bias": torch.zeros(1).expand(1 << 40)}),
    "other shape": lambda p: saved(p, state=weights(**{"network.body.0.bias": torch.ones(6)})),
    "other format": lambda p: saved(p, format=99),
    "format in words": lambda p: saved(p, format="1"),
    "wide": lambda p: saved(p, network=network(width=10**12)),
    "wide within reason": lambda p: saved(p, network=network(width=8000, depth=8000)),
    "deep": lambda p: saved(p, network=network(depth=10**9)),
    "from the hub": lambda p: saved(p, network=network(backbone="hf-hub:someone/model")),
    "from a folder": lambda p: saved(p, network=network(backbone_args={"file": "../../etc/passwd"})),
    "other labels": lambda p: saved(p, labels={"labels": {"a": 0, "b": 1, "c": 2}, "regions": {}, "ignore": []}),
    "odd labels": lambda p: saved(p, labels={"class_path": "os.system"}),
    "million labels": lambda p: saved(p, labels={"labels": {f"c{i}": i for i in range(10**5)}}),
    "text of megabytes": lambda p: saved(p, task="x" * 3_000_000),
    "huge input": lambda p: saved(p, preprocessing={**entry()["preprocessing"], "size": [10**6, 10**6]}),
    "truncated": lambda p: (saved(p), p.write_bytes(p.read_bytes()[:500])),
    "empty": lambda p: p.write_bytes(b""),
    "folder": lambda p: p.mkdir(),
    "link to itself": _link,
    "pipe": lambda p: os.mkfifo(p),
    "device": lambda p: p.symlink_to("/dev/zero"),
}
EXPORTED = {
    "pickle called safetensors": lambda p: (
        p.write_bytes(pickle.dumps(Call(SYSTEM, f"touch {CANARY}"))),
        p.with_suffix(".json").write_text(json.dumps(entry())),
    ),
    "header of a terabyte": _header_bomb,
    "description changed": lambda p: _exported(p, weights_sha256="00"),
    "description of the hub": lambda p: _exported(p, network=network(backbone="hf-hub:a/b")),
    "description is deep": lambda p: (_exported(p), p.with_suffix(".json").write_text("[" * 10**5)),
    "description is a pipe": lambda p: (
        _exported(p), p.with_suffix(".json").unlink(), os.mkfifo(p.with_suffix(".json"))),
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(visattn.networks, "create_model", lambda name, activation=None, **kwargs: Tiny(**kwargs))


@pytest.mark.parametrize("case", [*CHECKPOINTS, *EXPORTED])
def test_checkpoints(case, attack, tmp_path, tiny):
    name = "best.ckpt" if case in CHECKPOINTS else "best.safetensors"
    (CHECKPOINTS | EXPORTED)[case](tmp_path / name)
    masks(tmp_path / "in", ["a"])
    error = attack("predict", "in", "--checkpoint", name, "--output", "out")
    assert "best." in error
    assert not (tmp_path / "out").exists()


def test_the_payloads_are_real(tmp_path, monkeypatch, canary, tiny):
    monkeypatch.chdir(tmp_path)
    CHECKPOINTS["system"](tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert canary.exists()
    saved(tmp_path / "honest.ckpt")
    masks(tmp_path / "in", ["a"])
    assert main(["predict", "in", "--checkpoint", "honest.ckpt", "--output", "out", "--device", "cpu"]) == 0


def test_weights_files(tmp_path):
    rezipped(tmp_path / "bomb.pth", lambda entries: entries)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/9", bytes(50_000_000))
    _bytearray_bomb(tmp_path / "array.pth")
    old = tmp_path / "old.pth"
    torch.save({"a": bytearray(b"x")}, old, _use_new_zipfile_serialization=False)
    for name, expected in (("bomb", "compressed"), ("array", "execute"), ("old", "execute")):
        tracemalloc.start()
        with pytest.raises(UserError, match=expected):
            read_weights(tmp_path / f"{name}.pth")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()
    with pytest.raises(UserError, match="the state dict is empty"):
        load_official("pranet", {})


@pytest.mark.parametrize(
    "content",
    [
        {"format": 1, "folds": 2, "recipe": "a", "fingerprint": "", "runs": ["../../x", "/etc"]},
        {"format": 1, "folds": 2, "recipe": "../../x", "fingerprint": "", "runs": ["fold-0", "fold-1"]},
        {"format": 1, "folds": 10**9, "recipe": "a", "fingerprint": "", "runs": []},
        [[[]]],
    ],
)
def test_folds(content, attack, tmp_path):
    masks(tmp_path / "in", ["a"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "folds.json").write_text(json.dumps(content))
    assert "folds.json" in attack("predict", "in", "--checkpoint", "run", "--output", "out")


# Folders, images, tables


def masks(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    array = np.zeros((20, 20), np.uint8)
    array[3:12, 4:15] = 255
    for name in names:
        Image.fromarray(array).save(folder / "x.png")
        (folder / "x.png").rename(folder / f"{name}.png")


def _png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def _tiff_pages(count):
    """A TIFF of very many pages: counting them takes time with the square of their number."""
    fields = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64)]
    page = struct.pack("<H", len(fields)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    size = len(page) + 4
    pages = b"".join(page + struct.pack("<I", 72 + (i + 1) * size if i + 1 < count else 0) for i in range(count))
    return b"II*\0" + struct.pack("<I", 72) + bytes(64) + pages


IMAGES = {
    "bomb": lambda p: p.write_bytes(_png(100_000, 100_000)),
    "line": lambda p: p.write_bytes(_png(2**31 - 1, 1)),
    "pages": lambda p: p.write_bytes(_tiff_pages(20_000)),
    "zip": lambda p: zipfile.ZipFile(p, "w").writestr("a.png", "x"),
    "svg": lambda p: p.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
    "html after png": lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n<script>alert(1)</script>"),
    "postscript": lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file\n"),
    "somebody's file": lambda p: p.symlink_to("/etc/passwd"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case, attack, tmp_path):
    masks(tmp_path / "gt", ["a"])
    (tmp_path / "pred").mkdir()
    IMAGES[case](tmp_path / "pred" / "a.png")
    (tmp_path / "l.yaml").write_text("a: 0\nb: 255\n")
    error = attack("evaluate", "pred", "gt", "--labels", "l.yaml", "--output", "o")
    assert "pred/a.png" in error
    assert "root:" not in error, "nothing of the file's content"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "loop"])
def test_folders_with_what_never_ends(kind, attack, tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path)[-100:] if len(str(path)) > 100 else str(path))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "a.png")
    saved(tmp_path / "c.ckpt")
    assert "no image" in attack("predict", "in", "--checkpoint", "c.ckpt", "--output", "out")
    assert "a.png" in attack("predict", "in/a.png", "--checkpoint", "c.ckpt", "--output", "out")


def test_output_that_leads_elsewhere(attack, tmp_path, tiny):
    saved(tmp_path / "c.ckpt")
    masks(tmp_path / "in" / "sub", ["a"])
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    command = ["predict", "in", "--checkpoint", "c.ckpt", "--output"]
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "victim")
    assert "leads out" in attack(*command, "out")
    (tmp_path / "out" / "sub").unlink()
    for link in (Path.symlink_to, Path.hardlink_to):
        link(tmp_path / "out" / ".visattn.lock", tmp_path / "victim" / "file")
        attack(*command, "out")
        assert (tmp_path / "victim" / "file").read_text() == "precious"
        (tmp_path / "out" / ".visattn.lock").unlink(missing_ok=True)
    assert "is an input folder too" in attack(*command, "in")
    assert "is a file" in attack(*command, "c.ckpt")


@pytest.fixture
def scored(tmp_path, capfd, monkeypatch):
    """Two evaluations with names made to harm; what they print is harmless."""
    names = [
        "<script>alert(1)<",
        "=cmd|' calc'!A0",
        "\x1b[31mred",
        "new\nline",
        "\u202egnp",
        "q\"'",
        "[bold]x[",
        "{{7*7}}",
    ]
    for folder in ("gt", "pred"):
        masks(tmp_path / folder, [*names, "a" * 240, os.fsdecode(b"not-utf8-\xff")])
    (tmp_path / "l.yaml").write_text("background: 0\n'<img src=x onerror=alert(1)>[bold]\\e': 255\n")
    monkeypatch.chdir(tmp_path)
    for output in ("one", "two"):
        assert main(["evaluate", "pred", "gt", "--labels", "l.yaml", "--output", output]) == 0
    told = "".join(capfd.readouterr())
    assert "\x1b[31m" not in told
    return tmp_path


@pytest.mark.slow
def test_names_in_reports(scored, capfd):
    assert main(["compare", "one", "two", "--output", "out"]) == 0
    (scored / "data").mkdir()
    shutil.copytree(scored / "gt", scored / "data" / "images")
    shutil.copytree(scored / "gt", scored / "data" / "masks")
    assert main(["doctor", "data"]) in {0, 1}
    assert "\x1b[31m" not in "".join(capfd.readouterr())
    for page in ("one/report.html", "out/report.html"):
        text = (scored / page).read_text(errors="surrogateescape")
        assert "<script>alert" not in text
        assert "<img src=x" not in text
    for line in (scored / "one" / "cases.csv").read_text(errors="surrogateescape").splitlines():
        assert not line.startswith(("=", "@", "+", "-", '"='))


TABLES = {
    "summary.json": ["[" * 10**5, "[]", '{"labels": {"labels": {"a": [1, 2], "b": 5}}}', "fifo", "/dev/zero"],
    "cases.csv": [
        ",".join(f"c{i}" for i in range(10**5)) + "\n" + "a\n" * 10**5,
        "case,class,dice\na,b,c\n",
        "/dev/zero",
    ],
    "inputs.json": ['{"cases": 5}', '{"cases": [{"case": 1}]}'],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_scored_folders(name, scored, attack):
    for content in TABLES[name]:
        shutil.rmtree("bad", ignore_errors=True)
        shutil.copytree("one", "bad")
        path = scored / "bad" / name
        path.unlink()
        if content == "fifo":
            os.mkfifo(path)
        elif content.startswith("/"):
            path.symlink_to(content)
        else:
            path.write_text(content)
        assert "bad" in attack("compare", "one", "bad")


@pytest.mark.slow
def test_inputs_lead_to_images_alone(scored, capfd):
    os.mkfifo(scored / "pipe.png")
    cases = json.loads((scored / "one" / "inputs.json").read_text())["cases"]
    for target in (
        "/etc/passwd",
        "/dev/zero",
        str(scored / "pipe.png"),
        "/",
        "a\0b",
        "\ud800",
        "x" * 10**5,
        "http://x/y",
    ):
        changed = [{**case, "image": target, "truth": target, "prediction": target} for case in cases]
        (scored / "two" / "inputs.json").write_text(json.dumps({"cases": changed}))
        assert main(["compare", "one", "two", "--output", "out"]) == 0
        assert "root:" not in (scored / "out" / "report.html").read_text(errors="surrogateescape")
        shutil.rmtree(scored / "out")


@pytest.mark.parametrize("labels", ["/dev/zero", "/", "/etc/passwd", "pipe", "nowhere"])
def test_labels(labels, attack, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    masks(tmp_path / "m", ["a"])
    assert labels in attack("evaluate", "m", "m", "--labels", labels, "--output", "o")


def test_manifest_names_files_outside(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "c.ckpt")
    masks(tmp_path / "in", ["a"])
    victim = tmp_path / "victim.png"
    victim.write_text("precious")
    command = ["predict", "in", "--checkpoint", "c.ckpt", "--output", "out", "--device", "cpu"]
    assert main(command) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    import hashlib

    digest = hashlib.sha256(b"precious").hexdigest()
    for case in manifest["cases"]:
        case["files"] |= {"../victim.png": digest, str(victim): digest}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert main([*command, "--overwrite"]) == 0
    assert victim.read_text() == "precious"


@pytest.mark.slow
def test_surroundings(tmp_path, polyps):
    """Neither a home nor a folder for temporary files that can be written."""
    (tmp_path / "l.yaml").write_text("background: 0\npolyp: 255\n")
    here = {**os.environ, "HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"}
    command = ["visattn", "evaluate", str(polyps / "masks"), str(polyps), "--labels", "l.yaml", "--output", "o"]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
