from pathlib import Path

import pytest

from visattn.errors import UserError
from visattn.recipe import (
    DATA,
    TASKS,
    apply_override,
    check,
    find_recipe,
    load_recipe,
    merge,
    packaged_recipes,
    parse_overrides,
    read_yaml,
    resolve,
)


def tree(**changes):
    base = {
        "model": {"class_path": "SegmentationTask", "init_args": {"network": {"name": "pranet"}}},
        "data": {"class_path": "ImageMaskFolder", "init_args": {"root": "phantom", "labels": {"a": 0, "b": 1}}},
        "trainer": {"max_epochs": 1},
    }
    return {**base, **changes}


def test_recipe_by_path_packaged_name_and_nearest_name(tmp_path, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text("model: {}\n")
    assert find_recipe(str(own)) == own
    monkeypatch.chdir(tmp_path)  # no recipes/ here: the packaged file is meant
    assert find_recipe("polyp_pranet") == packaged_recipes()["polyp_pranet"]
    assert find_recipe("recipes/polyp_pranet.yaml") == packaged_recipes()["polyp_pranet"]
    with pytest.raises(UserError, match=r"Did you mean 'polyp_pranet'"):
        find_recipe("polyp_pranett")
    with pytest.raises(UserError, match="no such file"):
        find_recipe("elsewhere/polyp_pranet.yaml")


def test_every_packaged_recipe_resolves_to_registered_classes():
    names = packaged_recipes()
    assert {"polyp_pranet", "polyp_pranet_official"} <= names.keys()
    for name in names:
        found, resolved = resolve([name], [])
        assert found == name
        assert resolved["model"]["class_path"] in TASKS.values()
        assert resolved["data"]["class_path"] in DATA.values()


def test_override_reaches_init_args_with_and_without_naming_them():
    resolved = resolve(["polyp_pranet"], ["--model.network.backbone", "convnext_tiny", "--data.init_args.size=96"])[1]
    assert resolved["model"]["init_args"]["network"]["backbone"] == "convnext_tiny"
    assert resolved["model"]["init_args"]["network"]["name"] == "pranet"
    assert resolved["data"]["init_args"]["size"] == 96


def test_override_values_are_yaml_but_paths_and_expressions_stay_text():
    values = dict(
        (".".join(keys), value)
        for keys, value in parse_overrides(
            ["--a", "5e-4", "--b", "[1, 2]", "--c", "C: x", "--d", "null", "--e=true", "--f", "^(\\d+)_", "--g", "-1"]
        )
    )
    assert values == {"a": 5e-4, "b": [1, 2], "c": "C: x", "d": None, "e": True, "f": "^(\\d+)_", "g": -1}


def test_override_without_value_or_below_a_value_is_named():
    with pytest.raises(UserError, match=r"--data\.root: needs a value"):
        parse_overrides(["--data.root", "--data.size", "3"])
    with pytest.raises(UserError, match="no keys below"):
        apply_override(tree(), ["data", "root", "x"], 1)
    with pytest.raises(UserError, match="Did you mean 'trainer'"):
        apply_override(tree(), ["trainr", "max_epochs"], 1)


def test_override_leaves_the_tree_it_came_from_alone():
    original = tree()
    changed = dict(original)
    apply_override(changed, ["model", "network", "name"], "other")
    assert original["model"]["init_args"]["network"]["name"] == "pranet"


def test_later_config_replaces_a_whole_block():
    merged = merge(tree(), {"data": {"init_args": {"labels": {"x": 0, "y": 2}}}})
    assert merged["data"]["init_args"] == {"root": "phantom", "labels": {"x": 0, "y": 2}}
    assert merged["trainer"] == {"max_epochs": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "stands twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("a: [1, 2", "line 1"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ("? [1, 2]\n: 3", "plain word"),
    ],
)
def test_yaml_that_misleads_or_attacks_is_refused(text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(text, "r.yaml")
    assert "r.yaml" in str(caught.value)


def test_numbers_in_scientific_notation_are_numbers():
    assert read_yaml("5e-4", "x") == 5e-4
    assert read_yaml("1E3", "x") == 1000.0
    assert read_yaml("e5", "x") == "e5"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (tree(modle={}), "Did you mean 'model'"),
        (tree(model={"class_path": "os.system", "init_args": {}}), "unknown class"),
        (tree(model={"class_path": "SegmentatonTask"}), "Did you mean 'SegmentationTask'"),
        (tree(model={"init_args": {}}), "needs class_path"),
        (tree(data={"class_path": ["os"]}), "must be a name"),
        (tree(trainer={"callbacks": [{"class_path": "os.system"}]}), "unknown class"),
        (tree(trainer={"callbacks": ["EarlyStoping"]}), "Did you mean 'EarlyStopping'"),
        (tree(trainer={"logger": {"class_path": "os.system"}}), "only at model"),
        (tree(trainer={"strategy": [{"class_path": "os.system"}]}), "only at model"),
        (
            tree(model={"class_path": "SegmentationTask", "init_args": {"loss": {"class_path": "os.system"}}}),
            "only at model",
        ),
        (
            tree(trainer={"callbacks": [{"class_path": "EarlyStopping", "init_args": {"a": {"class_path": "x"}}}]}),
            "only at model",
        ),
        (tree(data={"class_path": "ImageMaskFolder", "init_args": [], "init_arg": 1}), "Did you mean 'data.init_args'"),
    ],
)
def test_classes_outside_the_tables_are_refused_before_any_import(broken, message):
    with pytest.raises(UserError, match=message):
        check(broken)


def test_recipe_file_must_be_text_and_a_mapping(tmp_path: Path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text"):
        load_recipe(binary)
    (tmp_path / "l.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="mapping"):
        load_recipe(tmp_path / "l.yaml")
    (tmp_path / "h.yaml").write_text("a: " + "x" * 1_100_000)
    with pytest.raises(UserError, match="too many"):
        load_recipe(tmp_path / "h.yaml")
