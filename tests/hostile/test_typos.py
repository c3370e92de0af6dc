"""One-letter errors in a recipe or on the command line are answered in a few lines that name what was meant.

Every key and every name of a class, network, backbone, loss, optimiser, schedule, augmentation and callback of every
packaged recipe is misspelt in all ways that one slip of the finger can: a letter too many, too few, another one, two
swapped. The answer is looked at where it is given, by the checks that `fit` makes before any work, not at the end of a
training; that it comes out of the command line alike is tested with a few.
"""

import copy
import random
import re
import string
from pathlib import Path

import pytest
import timm

from visattn.cli import main
from visattn.errors import UserError, readable
from visattn.losses import check_loss
from visattn.networks.features import _build
from visattn.recipe import DATA, TASKS, check, class_name, load_recipe, packaged_recipes
from visattn.recipe_cli import _named, check_keys
from visattn.task import SegmentationTask

FREE = {"labels", "class_weights", "regions", "channels_of", "modalities"}  # their keys are the user's own names
TABLES = {"class_path", "name", "backbone"}  # whose values are names from a table
SAMPLE = 60  # of the misspellings of a recipe, in the fast tests


def slips(word: str) -> list[str]:
    """Every word that one slip makes of `word`; the replacing letters are neighbours in the alphabet."""
    made = {word[:i] + word[i + 1 :] for i in range(len(word))}
    made |= {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    for i, letter in enumerate(word):
        other = string.ascii_lowercase[(string.ascii_lowercase.find(letter.lower()) + 1) % 26]
        made |= {word[:i] + other + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + other + word[i:]}
    return sorted(made - {word, ""})


def places(tree, path=()):
    """(path, word, kind) of every key, and of every value that is a name from a table."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(tree, dict):
            found.append((path, key, "key"))
            if key in TABLES and isinstance(value, str):
                found.append(((*path, key), value, "name"))
        if isinstance(value, dict | list) and key not in FREE:
            found += places(value, (*path, key))
    return found


def misspelt(tree, path, word, kind, wrong):
    changed = copy.deepcopy(tree)
    node = changed
    for key in path[:-1] if kind == "name" else path:
        node = node[key]
    if kind == "name":
        node[path[-1]] = wrong
    else:
        items = [(wrong if key == word else key, value) for key, value in node.items()]
        node.clear()
        node.update(items)
    return changed


def ask(tree):
    """What `fit` says of a recipe before it reads data, or None."""
    try:
        check(tree)
        for section, table in (("model", TASKS), ("data", DATA)):
            tree[section]["class_path"] = table[class_name(section, tree[section]["class_path"], table)]
            tree[section].setdefault("init_args", {})
        check_keys(tree)
        model, data = (tree[section]["init_args"] for section in ("model", "data"))
        _named(tree["data"]["class_path"])(**data)
        _named(tree["model"]["class_path"])(**model)
        if _named(tree["model"]["class_path"]) is SegmentationTask:
            check_loss(model["loss"])
        backbone = model["network"].get("backbone")
        if backbone is not None and not timm.is_model(backbone):
            _build(backbone, 3, 3, False, {})  # where the network is built
    except UserError as error:
        return str(error)
    return None


def rate(path: Path, limit: int | None):
    """How many misspellings there were, those that were answered wrongly, and those that mean something else."""
    tree = load_recipe(path)
    tries = [(place, wrong) for place in places(tree) for wrong in slips(place[1])]
    if limit is not None:
        tries = random.Random(0).sample(tries, min(limit, len(tries)))
    failed, count = [], 0
    for (where, word, kind), wrong in tries:
        answer = ask(misspelt(tree, where, word, kind, wrong))
        if answer is None:
            continue  # another valid name: adam for adamw
        count += 1
        text = readable(f"visattn: error: {answer}")
        suggested = re.findall(r"'([^']*)'", text.partition("Did you mean")[2].partition("?")[0])
        meant = word in suggested or any(guess.endswith(f".{word}") for guess in suggested)
        if not meant or len(text.splitlines()) > 6:
            failed.append((".".join(map(str, where)), word, wrong, text[:200]))
    return count, failed


RECIPES = sorted(packaged_recipes().items())


@pytest.mark.parametrize(("name", "path"), RECIPES, ids=[name for name, _ in RECIPES])
def test_a_sample_of_typos_is_answered(name, path):
    count, failed = rate(path, SAMPLE)
    assert count > SAMPLE // 2
    assert len(failed) <= 0.05 * count, failed[:5]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path"), RECIPES, ids=[name for name, _ in RECIPES])
def test_all_typos_are_answered(name, path, capsys):
    count, failed = rate(path, None)
    with capsys.disabled():
        print(f"\n{name}: {count - len(failed)} of {count} one-letter errors answered ({1 - len(failed) / count:.1%})")
        for entry in failed[:3]:
            print("  not:", entry[:3])
    assert count > 300
    assert len(failed) <= 0.05 * count, failed[:10]


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--data.bacth_size", "4"], "batch_size"),
        (["--data.split.gruop_by", "x"], "group_by"),
        (["--model.netwrok.name", "pranet"], "network"),
        (["--model.network.bakbone", "resnet18"], "backbone"),
        (["--model.network.name", "prant"], "pranet"),
        (["--model.optimizer.name", "adamv"], "adamw"),
        (["--model.schedule.name", "cosin"], "cosine"),
        (["--model.schedule.warmup_epoch", "1"], "warmup_epochs"),
        (["--trainer.max_epoch", "4"], "max_epochs"),
        (["--trainer.precision", "bf16-mixde"], "bf16-mixed"),
        (["--trianer.max_epochs", "4"], "trainer"),
        (["--trainer.callbacks", "[{class_path: EarlyStoping, init_args: {monitor: val/loss}}]"], "EarlyStopping"),
        (["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {montior: val/loss}}]"], "monitor"),
        (["--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: val/los}}]"], "val/loss"),
    ],
)
def test_typos_on_the_command_line(arguments, meant, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "polyp_pranet", "--data.root", "nowhere", *arguments]) == 2
    error = capsys.readouterr().err
    assert f"'{meant}'" in error.partition("Did you mean")[2], error
    assert len(error.strip().splitlines()) <= 6
    assert list(tmp_path.iterdir()) == []
