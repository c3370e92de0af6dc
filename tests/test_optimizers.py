import math

import pytest
import torch
from torch import nn

from visattn.errors import UserError
from visattn.optimizers import build_optimizer, build_schedule, freeze, parameter_groups, state_bytes


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)


def test_vectors_are_not_decayed_and_the_backbone_has_its_own_rate():
    net = Net()
    found = {id(p): (g["lr"], g["weight_decay"]) for g in parameter_groups(net, 1e-2, 0.1, 0.5) for p in g["params"]}
    assert found[id(net.backbone.weight)] == (5e-3, 0.1)
    assert found[id(net.backbone.bias)] == (5e-3, 0.0)
    assert found[id(net.head.weight)] == (1e-2, 0.1)
    assert found[id(net.head.bias)] == (1e-2, 0.0)


def test_optimizer_takes_its_own_arguments_and_refuses_others():
    optimizer = build_optimizer({"name": "adamw", "lr": 0.1, "betas": [0.5, 0.9], "weight_decay": 0.2}, Net())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    with pytest.raises(UserError, match="Did you mean 'weight_decay'"):
        build_optimizer({"name": "adam", "weight_deca": 0.2}, Net())
    with pytest.raises(UserError, match="Did you mean 'adamw'"):
        build_optimizer({"name": "adamww"}, Net())
    with pytest.raises(UserError, match="must be a number"):
        build_optimizer({"name": "adam", "lr": "fast"}, Net())


def test_schedule_warms_up_then_falls_to_zero():
    optimizer = build_optimizer({"name": "sgd", "lr": 1.0}, Net())
    schedule = build_schedule({"name": "cosine", "warmup_epochs": 2}, optimizer, total_steps=20, steps_per_epoch=2)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


FORMULAS = [
    ({"name": "cosine"}, lambda p: (1 + math.cos(math.pi * p)) / 2),
    ({"name": "cosine", "floor": 0.1}, lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2),
    ({"name": "poly"}, lambda p: (1 - p) ** 0.9),
    ({"name": "poly", "power": 2}, lambda p: (1 - p) ** 2),
    ({"name": "step"}, lambda p: 1 if p < 0.6 else 0.1 if p < 0.85 else 0.01),
    ({"name": "step", "milestones": [0.5], "gamma": 0.3}, lambda p: 1 if p < 0.5 else 0.3),
    ({"name": "constant"}, lambda p: 1),
]


@pytest.mark.parametrize(("config", "formula"), FORMULAS, ids=lambda value: str(value) if type(value) is dict else "")
@pytest.mark.parametrize("warmup_epochs", [0, 2.5])
def test_every_schedule_follows_its_formula_at_every_step(config, formula, warmup_epochs):
    total, per_epoch, lr = 44, 4, 0.3
    warmup = round(warmup_epochs * per_epoch)
    optimizer = build_optimizer({"name": "sgd", "lr": lr}, Net())
    schedule = build_schedule({**config, "warmup_epochs": warmup_epochs}, optimizer, total, per_epoch)
    for done in range(total):
        share = (done + 1) / (warmup + 1) if done < warmup else formula((done - warmup) / (total - warmup))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * share, abs=1e-9), done
        optimizer.step()
        schedule.step()


def test_cooldown_keeps_what_the_curve_reached_as_timm_does():
    scheduler = pytest.importorskip("timm.scheduler")
    per_epoch, curve, total, lr, floor = 5, 40, 55, 0.3, 0.02
    optimizer, other = (build_optimizer({"name": "sgd", "lr": lr}, Net()) for _ in range(2))
    config = {"name": "cosine", "cooldown_epochs": 3, "floor": floor}
    schedule = build_schedule(config, optimizer, total, per_epoch)
    timms = scheduler.CosineLRScheduler(other, t_initial=curve, lr_min=lr * floor, t_in_epochs=False)
    for done in range(total):
        timms.step_update(done)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], abs=1e-9), done
        optimizer.step()
        schedule.step()
    short = build_schedule({**config, "warmup_epochs": 9}, optimizer, 4, per_epoch)  # no step is left for the curve
    assert [round(short.lr_lambdas[0](done), 3) for done in range(4)] == [0.333, 0.667, 1.0, 0.02]


def test_the_bytes_of_an_optimiser_are_those_it_has_after_a_step():
    for config in (
        {"name": "adamw"},
        {"name": "adam", "amsgrad": True},
        {"name": "sgd", "momentum": 0.9},
        {"name": "sgd"},
    ):
        net = Net()
        optimizer = build_optimizer({"lr": 0.1, **config}, net)
        net.head(net.backbone(torch.ones(1, 3))).sum().backward()
        optimizer.step()
        tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.ndim]
        assert state_bytes(optimizer) == sum(v.numel() * v.element_size() for v in tensors), config


def test_schedule_names_its_keys():
    optimizer = build_optimizer({"name": "sgd", "lr": 1.0}, Net())
    with pytest.raises(UserError, match=r"power.*warmup_epochs"):
        build_schedule({"name": "poly", "powr": 2}, optimizer, 10, 1)
    for key in ("warmup_epochs", "cooldown_epochs"):
        with pytest.raises(UserError, match=f"{key}: must be"):
            build_schedule({"name": "poly", key: "two"}, optimizer, 10, 1)


def test_freeze_by_pattern_and_refusal_of_a_pattern_without_match():
    net = Net()
    assert freeze(net, ["backbone.*"]) == ["backbone.bias", "backbone.weight"]
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    with pytest.raises(UserError, match=r"'bakbone.\*' matches no parameter"):
        freeze(net, ["bakbone.*"])
    freeze(net, ["*"])
    with pytest.raises(UserError, match="nothing is left to train"):
        build_optimizer({"name": "sgd", "lr": 1.0}, net)
