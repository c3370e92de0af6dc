"""The documentation is true: its Python runs, its commands and recipes are accepted, its links lead somewhere."""

import re
import shlex
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "polyp_pranet.yaml"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "LICENSES.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, and the line of the page on which its text begins."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    found: list[Block] = []
    start, fence, language = 0, "", ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        match = re.match(r"\s*(`{3,})(\S*)", line)
        if match and not fence:
            fence, language, start = match[1], match[2], number
        elif fence and line.strip() == fence:
            body = textwrap.dedent("\n".join(lines[start : number - 1]))
            found.append(Block(language, body + "\n", start + 1))
            fence = ""
    assert not fence, f"the block that opens on line {start} is never closed"
    return found


def blocks_of(page: Path, *languages: str) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.language in languages]


def run_python(page_blocks: list[Block], name: str) -> None:
    """Execute the blocks in order in one namespace; a traceback names the page and its line."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in page_blocks:
        code = compile("\n" * (block.line - 1) + block.text, name, "exec")
        exec(code, namespace)


def commands(page: Path) -> list[list[str]]:
    """What the page tells the reader to type after `visattn`."""
    found = []
    for block in blocks_of(page, "sh", "bash", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["visattn"]:
                found.append(words[1:])
    return found


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", text)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def anchors(text: str) -> set[str]:
    return {slug(match[1]) for match in re.finditer(r"(?m)^#+\s+(.*)$", prose(text))}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of `text`, as if it stood in `page`, to a file or heading that does not exist."""
    bad = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside_docs = not page.is_relative_to(ROOT / "docs") or file.is_relative_to(ROOT / "docs")
        lost = not file.is_file() or not inside_docs
        if lost or (anchor and anchor not in anchors(text if file == page else file.read_text())):
            bad.append(target)
    return bad


PYTHON_PAGES = [page for page in PAGES if blocks_of(page, "python")]
COMMAND_PAGES = [page for page in PAGES if commands(page)]
YAML_BLOCKS = [
    pytest.param(block, id=f"{name_of(page)}:{block.line}") for page in PAGES for block in blocks_of(page, "yaml")
]


@pytest.fixture(scope="session")
def example_files(tmp_path_factory) -> Path:
    """`best.ckpt`, `polyp.jpg`, `volumes.ckpt` and `scan.nii.gz`, which the pages use as a reader's own."""
    import numpy as np
    import torch
    from PIL import Image

    from visattn.checkpoint import KEY, checkpoint_metadata
    from visattn.data import nifti
    from visattn.data.images import Preprocessing
    from visattn.data.intensity import Normalise
    from visattn.data.phantom import phantom_images
    from visattn.data.volume_preprocessing import VolumePreprocessing
    from visattn.labels import Labels
    from visattn.networks import create_model

    folder = tmp_path_factory.mktemp("examples")
    image, _, _ = next(iter(phantom_images(1, seed=3)))
    Image.fromarray(image).save(folder / "polyp.jpg")
    network = {"name": "pranet", "backbone": "resnet18", "in_channels": 3, "classes": 1}
    torch.manual_seed(0)
    weights = {f"network.{key}": value for key, value in create_model(**network).state_dict().items()}
    entry = checkpoint_metadata(
        recipe={},
        labels=Labels.from_config({"background": 0, "polyp": 255}).to_config(),
        preprocessing=Preprocessing(
            size=(96, 96), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), channels=3
        ).to_config(),
        network=network,
        data={"description": "none: random weights", "fingerprint": ""},
    )
    torch.save({"state_dict": weights, KEY: entry}, folder / "best.ckpt")
    scan = np.random.default_rng(0).random((12, 14, 10)).astype(np.float32)
    nifti.write(folder / "scan.nii.gz", scan, nifti.Geometry((12, 14, 10), np.diag([1, 1, 2, 1.0])), "image")
    network = {"name": "unet3d", "filters": [2, 4], "in_channels": 1, "classes": 1}
    weights = {f"network.{key}": value for key, value in create_model(**network).state_dict().items()}
    entry = checkpoint_metadata(
        recipe={},
        labels=Labels.from_config({"background": 0, "lesion": 1}).to_config(),
        preprocessing=VolumePreprocessing(("t1",), (Normalise("zscore"),), patch=(8, 8, 8)).to_config(),
        network=network,
        data={"description": "none: random weights", "fingerprint": ""},
    )
    torch.save({"state_dict": weights, KEY: entry}, folder / "volumes.ckpt")
    return folder


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run(page, example_files, tmp_path, monkeypatch):
    for file in example_files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    run_python(blocks_of(page, "python"), name_of(page))


def test_a_failing_block_is_reported_with_its_line():
    text = "# T\n\n```python\nx = 1\n```\n\ntext\n\n```python\nassert x == 2\n```\n"
    with pytest.raises(AssertionError) as caught:
        run_python(blocks(text), "page.md")
    assert caught.traceback[-1].lineno == 9  # counted from 0: line 10 of the page
    assert str(caught.traceback[-1].path).endswith("page.md")


def converted(source, model, output, arguments):
    """What `convert_weights` tells of a file that is not there; the network has to be one that it takes."""
    from visattn.convert import Converted
    from visattn.weights import OFFICIAL, official_backbones

    assert model in OFFICIAL or model in official_backbones()
    return Converted(output, 0, 0, (), "")


@pytest.fixture
def accepts(monkeypatch, capsys):
    """Whether `visattn WORDS` is accepted, up to the point where it would start to work, and what it says if not."""
    from visattn import (
        checkpoint,
        compare,
        convert,
        doctor,
        evaluate,
        evaluate_classes,
        fit,
        folds,
        init,
        members,
        predict,
        predict_classes,
        predict_volumes,
    )
    from visattn.cli import main
    from visattn.commands.predict import _VOLUMES
    from visattn.data import phantom
    from visattn.recipe import resolve

    monkeypatch.setattr(fit, "run_stage", lambda stage, name, tree, *rest: fit.parse(tree) and 0)
    monkeypatch.setattr(folds, "fit_folds", lambda chosen, name, tree, *rest: fit.parse(tree) and 0)
    monkeypatch.setattr(predict, "predict_folder", lambda *args, **kwargs: 0)
    monkeypatch.setattr(predict_volumes, "predict_volumes", lambda *args, **kwargs: 0)
    member = SimpleNamespace(task="segmentation")
    monkeypatch.setattr(members, "read_members", lambda checkpoint: [member])
    monkeypatch.setattr(evaluate, "evaluate_folder", lambda *args, **kwargs: 0)
    monkeypatch.setattr(evaluate_classes, "evaluate_classes", lambda *args, **kwargs: 0)
    monkeypatch.setattr(predict_classes, "predict_classes", lambda *args, **kwargs: 0)
    monkeypatch.setattr(compare, "compare_runs", lambda *args, **kwargs: 0)
    monkeypatch.setattr(
        doctor, "run_doctor", lambda folder, configs, rest, **_: 0 if not configs else not resolve(configs, rest)
    )
    monkeypatch.setattr(checkpoint, "export_weights", lambda *args: [])
    monkeypatch.setattr(phantom, "write_phantom", lambda *args, **keywords: None)
    monkeypatch.setattr(convert, "convert_weights", converted)
    # What init writes is trained in the page's next line.
    monkeypatch.setattr(init, "write_recipe", lambda _, output, **keys: shutil.copy(RECIPE, output) and 0)

    def check(words: list[str]) -> tuple[bool, str]:
        rank = 3 if {f"--{name}" for name in _VOLUMES} & set(words) else 2  # of the checkpoint that the page means
        monkeypatch.setattr(members, "rank_of", lambda _: rank)
        member.task = "classification" if "--split" in words else "segmentation"
        try:
            code = main(words)
        except SystemExit as end:  # --help, --version
            code = end.code
        return code == 0, capsys.readouterr().err

    return check


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=name_of)
def test_commands_are_accepted(page, accepts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {" ".join(words): accepts(words) for words in commands(page) if not accepts(words)[0]} == {}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("fit --config polyp_pranet --data.rot x", "rot"),
        ("fit --config polyp_prant", "polyp_prant"),
        ("predict a --checkpoint b --output c --overlaps", "overlaps"),
        ("trian", "trian"),
    ],
)
def test_a_command_that_does_not_exist_is_refused(line, word, accepts, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```sh\ncd photos\nvisattn {line}  # a comment\n```\n")
    (words,) = commands(page)
    assert words == line.split()
    accepted, message = accepts(words)
    assert not accepted
    assert word in message


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_recipe_fragments_are_accepted(block, monkeypatch):
    """A YAML block is a recipe, or a part of one that lies over the packaged recipe."""
    from visattn.data import DATA
    from visattn.fit import parse
    from visattn.recipe import TASKS, check, class_name, find_recipe, load_recipe, merge, read_yaml

    name, network = ("hippocampus_unet3d", "unet3d") if "VolumeFolder" in block.text else ("polyp_pranet", "pranet")
    if any(word in block.text for word in ("ClassificationTask", "MedMNIST", "ImageFolder")):
        name, network = "medmnist_medvitv2", "convnext_tiny" if "convnext_tiny" in block.text else "va_medvit_tiny"
        monkeypatch.setattr("visattn.data.medmnist.find_file", lambda root, flag, native: Path(root, f"{flag}.npz"))
        monkeypatch.setattr("visattn.data.medmnist.case_shape", lambda path: (28, 28))
    given = read_yaml(block.text, "page")
    network = given.get("model", {}).get("init_args", {}).get("network", {}).get("name", network)
    tree = merge(load_recipe(find_recipe(name)), given)
    check(tree)
    for section, names in (("model", TASKS), ("data", DATA)):
        path = names[class_name(section, tree[section]["class_path"], names)]
        tree[section] = {**tree[section], "class_path": path}
    task, _ = parse(tree).build()
    assert task.config["network"]["name"] == network


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_found():
    index = ROOT / "docs" / "index.md"
    text = (
        "# Here I am\n[a](recipes.md) [b](#here-i-am) [c](nowhere.md) [d](#there) [e](../LICENSE) [f](recipes.md#x)\n"
    )
    assert broken_links(index, text) == ["nowhere.md", "#there", "../LICENSE", "recipes.md#x"]
    assert broken_links(ROOT / "README.md", "[a](LICENSE) [b](docs/recipes.md#splits) [c](https://example.org)") == []


def pages_in(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(item)]


def test_the_navigation_lists_every_page():
    listed = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")
    )
    assert len(listed) == len(set(listed))
