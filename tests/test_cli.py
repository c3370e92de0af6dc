import json
import subprocess
import sys

import pytest

import visattn
from visattn.cli import _build_parser, main


def test_help_runs_in_a_fresh_process_without_importing_torch():
    code = (
        "import sys; sys.argv = ['visattn', '--help']\n"
        "from visattn.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'lightning', 'monai', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert visattn.NOTICE in done.stdout
    for command in ("fit", "validate", "test", "predict", "recipes", "models", "export-weights", "phantom"):
        assert f"\n    {command}" in done.stdout


@pytest.mark.parametrize(
    "command", [[], *([name] for name in _build_parser()[1])], ids=lambda command: "".join(command)
)
def test_help_fits_a_terminal_of_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) >= 80] == []


def test_module_and_command_are_the_same(tmp_path):
    done = subprocess.run([sys.executable, "-m", "visattn", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == f"visattn {visattn.__version__}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fitt"], "Did you mean 'fit'?"),
        (["predict"], "required: --checkpoint, --output"),
        (["predict", "x", "--checkpoint", "c", "--output", "o", "--overlay"], "Did you mean --overlays?"),
        (["phantom", "x", "--cout", "3"], "Did you mean --count?"),
        (["fit"], "required: --config"),
        (["fit", "--config", "polyp_pranett"], "Did you mean 'polyp_pranet'?"),
        (["fit", "--config", "polyp_pranet", "extra"], "unexpected argument 'extra'"),
        (["fit", "--conf", "polyp_pranet"], "required: --config"),
        (["fit", "--config", "polyp_pranet", "--modl.network.name", "x"], "Did you mean 'model'?"),
        (["models", "nothing*"], "no model matches"),
        (["export-weights", "nowhere.ckpt", "--output", "w.safetensors"], "nowhere.ckpt"),
    ],
)
def test_mistakes_end_in_a_few_lines_and_code_2(arguments, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("visattn: error: ")
    assert expected in error
    assert len(error.strip().splitlines()) <= 6
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_recipe_is_told_before_torch_is_imported(tmp_path):
    code = (
        "import sys\n"
        "from visattn.cli import main\n"
        "assert main(['fit', '--config', 'polyp_pranet', '--model.class_path', 'os.system']) == 2\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)


def test_recipes_and_models_as_tables_and_json(capsys):
    assert main(["recipes", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["polyp_pranet"]["network"] == "pranet + res2net50d"
    assert rows["polyp_pranet_official"]["epochs"] == 19
    assert main(["models", "pra*", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["name"] == "pranet"
    assert row["parameters"] == 30_498_319  # the official count without its unused classifier
    assert main(["recipes"]) == 0
    assert "polyp_pranet_official" in capsys.readouterr().out


def test_phantom_writes_pairs(tmp_path, capsys):
    assert main(["phantom", str(tmp_path / "p"), "--count", "3", "--seed", "2"]) == 0
    names = {path.name for path in (tmp_path / "p" / "images").iterdir()}
    assert len(names) == 3
    assert names == {path.name for path in (tmp_path / "p" / "masks").iterdir()}


def test_importing_the_package_is_light():
    code = "import sys, visattn; assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
