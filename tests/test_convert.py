"""`visattn convert`: Keras's files written here in both of Keras's layouts, and files that are not to be trusted."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visattn import load_official
from visattn.cli import main
from visattn.convert import convert_weights
from visattn.errors import UserError
from visattn.keras_file import read_keras_file
from visattn.networks import create_model
from visattn.networks.agunet_weights import official_names
from visattn.weights import official_backbones

h5py = pytest.importorskip("h5py")

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"filters": [4, 6, 8], "classes": 3}
THEIRS = {"running_mean": "moving_mean", "running_var": "moving_variance"}


def small_weights(name="agunet", seed=0):
    """Weights of a small network under the official names, and the network."""
    torch.manual_seed(seed)
    network = create_model(name, **SMALL).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    state = network.state_dict()
    names = [(ours, theirs) for ours, theirs in official_names(network) if not theirs.endswith("batches_tracked")]
    return network, {theirs: state[ours].numpy() for ours, theirs in names}


def keras_layers(weights, offset=0, suffix=""):
    """Layer to its (weight name, array in Keras's layout), in no order; `offset` is added to every number."""
    layers = {}
    for key, array in weights.items():
        layer, _, leaf = key.partition(".")
        kind, _, number = layer.rpartition("_") if layer[-1].isdigit() and layer != "conv3d" else (layer, "", "0")
        number = int(number) + offset
        if kind not in ("pam", "cam"):
            layer = f"{kind}_{number}" if number else kind
        if array.ndim == 5:
            array = array.transpose(2, 3, 4, 1, 0)
        leaf = THEIRS.get(leaf, leaf)
        leaf = f"{layer}_gamma" if kind in ("pam", "cam") and leaf == "gamma" else leaf
        layers.setdefault(layer, []).append((f"{layer}{suffix}/{leaf.replace('.', '/')}:0", array))
    return {layer: layers[layer] for layer in sorted(layers, key=lambda layer: layer[::-1])}


def write_h5(path, layers, inside=None, split=False, **options):
    """A file as Keras's save_weights writes it, or as save does with `inside` model_weights."""
    with h5py.File(path, "w") as file:
        root = file.create_group(inside) if inside else file
        names = [layer.encode() for layer in (*layers, "activation_3")]
        if split:
            root.attrs["layer_names0"], root.attrs["layer_names1"] = names[:5], names[5:]
        else:
            root.attrs["layer_names"] = names
        root.attrs["backend"] = b"tensorflow"
        root.create_group("activation_3").attrs["weight_names"] = []
        for layer, entries in layers.items():
            group = root.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name, _ in entries]
            for name, array in entries:
                group.create_dataset(name, data=array, **options)
        if inside:
            file.create_group("optimizer_weights").create_dataset("iterations:0", data=3)
    return path


def outputs(network):
    x = torch.randn(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(x)


@pytest.mark.parametrize(
    ("layout", "offset"),
    [
        ({}, 0),
        ({"inside": "model_weights"}, 37),
        ({"split": True, "compression": "gzip", "shuffle": True, "fletcher32": True}, 1),
        ({"suffix": "_1"}, 9),
    ],
    ids=["save_weights", "save", "split names", "names made unique"],
)
def test_keras_layouts(tmp_path, layout, offset):
    network, weights = small_weights()
    suffix = layout.pop("suffix", "")
    source = write_h5(tmp_path / "w.h5", keras_layers(weights, offset, suffix), **layout)
    done = convert_weights(source, "agunet", tmp_path / "w.safetensors", SMALL)
    assert done.tensors == len(weights)
    torch.testing.assert_close(
        outputs(load_official("agunet", tmp_path / "w.safetensors", **SMALL)), outputs(network), rtol=0, atol=0
    )
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert json.loads(file.metadata()["arguments"]) == SMALL


def test_a_model_inside_a_model(tmp_path):
    network, weights = small_weights()
    nested = {"model_1": [entry for entries in keras_layers(weights, 4).values() for entry in entries]}
    convert_weights(write_h5(tmp_path / "w.h5", nested), "agunet", tmp_path / "w.safetensors", SMALL)
    torch.testing.assert_close(outputs(load_official("agunet", tmp_path / "w.safetensors", **SMALL)), outputs(network))


def test_daunet_and_its_lost_projections(tmp_path, capsys):
    """Keras saves the two factors gamma, and not the projections of the position attention."""
    _, weights = small_weights("daunet")
    saved = {key: array for key, array in weights.items() if not key.startswith("pam.conv_")}
    source = write_h5(tmp_path / "w.h5", keras_layers(saved))
    call = ["convert", str(source), "--model", "daunet", "--output", str(tmp_path / "w.safetensors")]
    assert main([*call, "--classes", "3", "--filters=[4, 6, 8]"]) == 0
    said = capsys.readouterr().out
    assert "note: official daunet: the weights do not hold the position attention's projections" in said
    assert set(load_file(tmp_path / "w.safetensors")) == set(saved)


@pytest.mark.slow
def test_the_golden_network_through_a_keras_file(tmp_path):
    """The names and shapes of the official code's own Keras file, and its stored outputs."""
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    facts = json.loads((GOLDEN / "agunet/agunet_full.json").read_text())
    layers = {}
    for key, shape, _, _ in facts["entries"]:
        array = fill.fill(key, shape)
        array = array.transpose(2, 3, 4, 1, 0) if array.ndim == 5 else array
        assert list(array.shape) == facts["keras_shapes"][key]
        layers.setdefault(key.split(".")[0], []).append((facts["keras_names"][key], array))
    assert set(layers) < {name for name, _ in facts["keras_layer_order"]}
    source = write_h5(tmp_path / "w.h5", layers, inside="model_weights")
    assert main(["convert", str(source), "--model", "agunet", "--output", str(tmp_path / "w.safetensors")]) == 0
    network = load_official("agunet", tmp_path / "w.safetensors")
    case = facts["cases"][0]
    with torch.no_grad():
        found = network(torch.from_numpy(fill.make_input(case["input_seed"], case["input_shape"])))
    stored = np.load(GOLDEN / "agunet/agunet_full.npz")
    for level, logits in enumerate(found):
        error = np.abs(fill.sample(logits.numpy()) - stored[f"case0/logit{level}"]).max()
        assert error <= 2e-5 * case["outputs"][f"logit{level}"]["std"]


def test_torch_and_safetensors_files(tmp_path):
    network, weights = small_weights()
    tensors = {key: torch.from_numpy(array.copy()) for key, array in weights.items()}
    torch.save({"state_dict": {f"module.{key}": value for key, value in tensors.items()}}, tmp_path / "w.pth")
    save_file(tensors, tmp_path / "in.safetensors")
    for source in ("w.pth", "in.safetensors"):
        convert_weights(tmp_path / source, "agunet", tmp_path / "out.safetensors", SMALL)
        loaded = load_official("agunet", tmp_path / "out.safetensors", **SMALL)
        torch.testing.assert_close(outputs(loaded), outputs(network), rtol=0, atol=0)


def test_the_command_says_how_to_go_on(tmp_path, capsys):
    network, weights = small_weights()
    source, output = write_h5(tmp_path / "w.h5", keras_layers(weights)), tmp_path / "w.safetensors"
    call = ["convert", str(source), "--model", "agunet", "--output", str(output)]
    assert main([*call, "--classes", "3", "--filters", "[4, 6, 8]"]) == 0
    said = capsys.readouterr().out
    expression = said.splitlines()[-1].removeprefix("next, in Python: visattn.")
    torch.testing.assert_close(outputs(eval(expression, {"load_official": load_official})), outputs(network))
    assert main(call) == 2  # other filters
    assert "w.h5: official agunet: the state dict does not fit" in capsys.readouterr().err
    assert main([*call, "--filtres", "[4]"]) == 2
    assert "Did you mean 'filters'" in capsys.readouterr().err
    assert main([*call, "--classes"]) == 2
    assert main([*call, "--classes", "many"]) == 2
    assert main([*call, "stray"]) == 2


def one_layer(**change):
    """A file of one layer, with something about it changed."""

    def build(path):
        write_h5(path, {"conv3d": [("conv3d/kernel:0", np.zeros((3, 3, 3, 1, 4), np.float32))]})
        with h5py.File(path, "a") as file:
            group = file["conv3d/conv3d"]
            if "link" in change:
                del group["kernel:0"]
                group["kernel:0"] = change["link"]
            if "dataset" in change:
                del group["kernel:0"]
                change["dataset"](group)
            if "attribute" in change:
                name, value = change["attribute"]
                file["conv3d"].attrs[name] = value
            if "call" in change:
                change["call"](file)

    return build


def outside(group):
    group.create_dataset("kernel:0", (4,), "f4", external=[("/etc/hostname", 0, 16)])


def virtual(group):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
    group.create_virtual_dataset("kernel:0", layout)


def references(group):
    group.create_dataset("kernel:0", (1,), h5py.ref_dtype)


def bomb(group):
    group.create_dataset("kernel:0", (2**36,), "f4", chunks=(2**20,), compression="gzip")


def plugin(group):
    group.create_dataset("kernel:0", (4,), "f4", chunks=(4,), compression=32015, allow_unknown_filter=True)


def cycle(file):
    file["conv3d/conv3d/conv3d"] = file["conv3d"]
    file["conv3d"].attrs["weight_names"] = [b"conv3d/" * 3 + b"kernel:0"]


BAD = {
    "soft link": (one_layer(link=h5py.SoftLink("/other")), r"is a link \(SoftLink\)"),
    "external link": (one_layer(link=h5py.ExternalLink("other.h5", "/x")), r"is a link \(ExternalLink\)"),
    "external storage": (one_layer(dataset=outside), "in another file"),
    "virtual": (one_layer(dataset=virtual), "in another file"),
    "references": (one_layer(dataset=references), "holds object, but weights"),
    "integers": (one_layer(dataset=lambda group: group.create_dataset("kernel:0", data=[1, 2])), "holds int64"),
    "bomb": (one_layer(dataset=bomb), "announces 68719476736 numbers"),
    "plugin": (one_layer(dataset=plugin), "the filter 32015|damaged"),
    "nan": (one_layer(dataset=lambda g: g.create_dataset("kernel:0", data=np.full((3,) * 5, np.nan))), "NaN"),
    "four axes": (one_layer(dataset=lambda g: g.create_dataset("kernel:0", data=np.zeros((3,) * 4))), "4 axes"),
    "group": (one_layer(dataset=lambda group: group.create_group("kernel:0")), "is no array"),
    "missing": (one_layer(attribute=("weight_names", [b"conv3d/bias:0"])), "incomplete: bias:0"),
    "upwards": (one_layer(attribute=("weight_names", [b"../kernel:0"])), "has no place"),
    "absolute": (one_layer(attribute=("weight_names", [b"/conv3d/conv3d/kernel:0"])), "has no place"),
    "numbers as names": (one_layer(attribute=("weight_names", [1, 2])), "no list of names"),
    "long name": (one_layer(attribute=("weight_names", [b"x" * 2000])), "more than 1000 bytes"),
    "turning in circles": (one_layer(call=cycle), "the layer conv3d|missing"),
    "named by hand": (lambda path: write_h5(path, {"head": [("head/kernel:0", np.zeros((1,) * 5))]}), "layer head is"),
    "twice": (
        lambda path: write_h5(path, {"conv3d": [("a/bias:0", np.ones(2)), ("b/bias:0", np.ones(2))]}),
        "two layers are called conv3d",
    ),
    "keras 3": (lambda path: h5py.File(path, "w").create_group("layers").file.close(), "Keras 3"),
    "no keras": (lambda path: h5py.File(path, "w").create_dataset("x", data=[1.0]).file.close(), "no Keras weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(tmp_path, name):
    build, said = BAD[name]
    build(tmp_path / "w.h5")
    with pytest.raises(UserError, match=said) as caught:
        convert_weights(tmp_path / "w.h5", "agunet", tmp_path / "w.safetensors", SMALL)
    assert str(caught.value).startswith(str(tmp_path / "w.h5"))
    assert not (tmp_path / "w.safetensors").exists()


def test_a_truncated_file(tmp_path):
    _, weights = small_weights()
    content = write_h5(tmp_path / "w.h5", keras_layers(weights)).read_bytes()
    for size in (8, 100, 3000, len(content) // 2, len(content) - 1):
        (tmp_path / "w.h5").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"truncated or damaged|incomplete|damaged"):
            read_keras_file(tmp_path / "w.h5")


def test_other_mistakes(tmp_path):
    _, weights = small_weights()
    source = write_h5(tmp_path / "w.h5", keras_layers(weights))
    for arguments, said in (
        ((source, "agunett", tmp_path / "w.safetensors", {}), "Did you mean"),
        ((source, "agunet", tmp_path / "w.pth", {}), "must end in .safetensors"),
        ((tmp_path / "no.h5", "agunet", tmp_path / "w.safetensors", {}), "no such file"),
        ((source, "pranet", tmp_path / "w.safetensors", {}), "Keras weights, but those of pranet"),
    ):
        with pytest.raises(UserError, match=said):
            convert_weights(*arguments)


def test_a_backbones_weights_become_timms(tmp_path, capsys):
    """Nested as training scripts save them; another number of classes is the checkpoint's, not to be asked for."""
    import timm

    torch.manual_seed(0)
    ours = timm.create_model("va_nat_mini", num_classes=4)
    family = official_backbones()["va_nat_mini"]
    official = {f"module.{family.official_name(key)}": value for key, value in ours.state_dict().items()}
    torch.save({"model": official, "epoch": 3}, tmp_path / "w.pth")
    output = tmp_path / "w.safetensors"
    assert main(["convert", str(tmp_path / "w.pth"), "--model", "va_nat_mini", "--output", str(output)]) == 0
    call = capsys.readouterr().out.rsplit("next, in Python: ", 1)[1].strip()
    assert call == f'timm.create_model("va_nat_mini", checkpoint_path="{output}", num_classes=4)'
    again = timm.create_model("va_nat_mini", checkpoint_path=str(output), num_classes=4)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())


def test_a_backbone_without_official_weights_is_refused(tmp_path, capsys):
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pth")
    arguments = ["convert", str(tmp_path / "w.pth"), "--output", str(tmp_path / "w.safetensors")]
    assert main([*arguments, "--model", "va_nat_minni"]) == 2
    assert "Did you mean 'va_nat_mini'?" in capsys.readouterr().err
    assert main([*arguments, "--model", "va_nat_mini"]) == 2
    assert "missing" in capsys.readouterr().err
    assert not (tmp_path / "w.safetensors").exists()
