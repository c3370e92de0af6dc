"""What tests of blocks share: golden cases of the official code, and the slow oracles in tests/reference."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"visattn_tests_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Golden:
    """One golden case: the official state dict, inputs, and the outputs that the official code gave."""

    def __init__(self, system: str, variant: str) -> None:
        folder = TESTS / "golden" / system
        self.fill = load(TESTS / "golden" / "fill.py")
        self.facts = json.loads((folder / f"{variant}.json").read_text())
        self.arrays = np.load(folder / f"{variant}.npz")
        self.cases = range(len(self.facts["cases"]))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every entry that the official code does not compute itself, by its official key."""
        state = {}
        for key, shape, _, filled in self.facts["entries"]:
            if not filled:
                continue
            factor = next((f for pattern, f in self.facts.get("fill_scale", []) if re.search(pattern, key)), 1.0)
            state[key] = torch.from_numpy(factor * self.fill.fill(key, shape))
        return state

    def load_into(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module` with the case's weights under their official keys; nothing may be left over or missing."""
        missing, unexpected = module.load_state_dict(self.state_dict(), strict=False)
        assert unexpected == []
        computed = {key for key, _, _, filled in self.facts["entries"] if not filled}
        assert set(missing) <= computed, missing
        parameters = {name: list(p.shape) for name, p in module.named_parameters()}
        official = {key: shape for key, shape, _, filled in self.facts["entries"] if filled}
        assert parameters.items() <= official.items()
        return module.eval()

    def input(self, case: int) -> torch.Tensor:
        facts = self.facts["cases"][case]
        return torch.from_numpy(self.fill.make_input(facts["input_seed"], facts["input_shape"]))

    def error(self, case: int, name: str, value: torch.Tensor) -> float:
        """Largest difference to the official output, as a multiple of what the case tolerates (1 is the limit).

        20 times the official code's own rounding error relative to the largest value where that is stored, else 2e-5 of
        the standard deviation.
        """
        facts = self.facts["cases"][case]["outputs"][name]
        assert list(value.shape) == facts["shape"]
        stored = self.arrays[f"case{case}/{name}"]
        difference = float(np.abs(self.fill.sample(value.detach().numpy()) - stored).max())
        assert np.isfinite(difference)
        if "noise" in facts:
            return difference / (max(20 * facts["noise"], 5e-6) * float(np.abs(stored).max()))
        return difference / (2e-5 * facts["std"])

    def check_backbone(self, model: torch.nn.Module) -> None:
        """Every stored output of every case, against what `model` gives: logits, all maps, some the stem's."""
        for case in self.cases:
            stored = set(self.facts["cases"][case]["outputs"])
            found = {}
            hook = model.stem.register_forward_hook(lambda _module, _inputs, out, found=found: found.update(stem=out))
            with torch.no_grad():
                last, maps = model.forward_intermediates(self.input(case))
                found |= {f"stage{number}": each for number, each in enumerate(maps, 1)}
                found["logits"] = model.forward_head(last)
            hook.remove()
            assert stored <= set(found) <= {*stored, "stem"}
            for name in stored:
                assert self.error(case, name, found[name]) < 1, name
