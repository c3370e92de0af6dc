"""Losses against slow loops in float64, MONAI, and the golden cases of PraNet's."""

import copy
import importlib.util
import itertools
import json
import math
import pickle
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from visattn.errors import UserError
from visattn.labels import IGNORE, Labels
from visattn.losses import LOSSES, Classes, SegmentationLoss, build_loss, check_loss

GOLDEN = Path(__file__).parent / "golden"
BINARY = Labels.from_config({"background": 0, "polyp": 255})
CLASSES = Labels.from_config({"background": 0, "edema": 1, "core": 2})
REGIONS = Labels.from_config(
    {"background": 0, "edema": 1, "core": 2}, regions={"whole": ["edema", "core"], "inner": ["core"]}
)
KINDS = {"binary": BINARY, "softmax": CLASSES, "regions": REGIONS}
WEIGHTS = {
    "binary": {"background": 0.5, "polyp": 3.0},
    "softmax": {"background": 0.5, "core": 3.0},
    "regions": {"whole": 0.5, "inner": 3.0},
}
CONFIGS = [
    {"name": "structure", "pixel_weighted_bce": True},
    {"name": "structure", "pixel_weighted_bce": False},
    {"name": "bce"},
    {"name": "focal", "gamma": 2.0},
    {"name": "dice"},
    {"name": "dice", "batch": True, "include_background": True, "smooth": 0.1},
    {"name": "tversky", "alpha": 0.2, "beta": 0.9},
    {"name": "dice_ce", "dice_weight": 0.7, "ce_weight": 1.3},
]


def config_id(config):
    return "-".join(str(value) for value in config.values())


def case(labels, shape=(2, 5, 7), ignored=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(zlib.crc32(str((labels, shape)).encode()))
    logits = 2 * torch.randn(shape[0], labels.channels, *shape[1:], generator=generator, dtype=dtype)
    target = torch.randint(0, len(labels.names), shape, generator=generator).to(torch.uint8)
    if ignored:
        target[torch.rand(shape, generator=generator) < 0.2] = IGNORE
    return logits, target


# The oracle: one pixel at a time, plain Python floats. It shares no line with the code under test.


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def oracle(config, labels, logits, target, weights):
    config = dict(config)
    name = config.pop("name")
    if name == "dice_ce":
        return config["dice_weight"] * oracle({"name": "dice"}, labels, logits, target, weights) + config[
            "ce_weight"
        ] * oracle({"name": "bce"}, labels, logits, target, weights)
    batch, channels = logits.shape[:2]
    points = list(itertools.product(*(range(n) for n in logits.shape[2:])))
    softmax = labels is CLASSES
    members = {"binary": [{1}], "softmax": [{0}, {1}, {2}], "regions": [{1, 2}, {2}]}
    inside = members[next(kind for kind, value in KINDS.items() if value is labels)]
    names = ["whole", "inner"] if labels is REGIONS else list(labels.names)
    weight = [(weights or {}).get(n, 1.0) for n in names]

    def truth(b, k, p):
        return float(int(target[(b, *p)]) in inside[k])

    def counts(b, p):
        return int(target[(b, *p)]) != IGNORE

    def probability(b, k, p):
        row = [float(logits[(b, j, *p)]) for j in range(channels)]
        return math.exp(row[k]) / sum(math.exp(v) for v in row) if softmax else sigmoid(row[k])

    def border(b, k, p):
        near = sum(
            truth(b, k, q) * counts(b, q) for q in points if all(abs(i - j) <= 15 for i, j in zip(p, q, strict=True))
        )
        return 1 + 5 * abs(near / 31 ** len(p) - truth(b, k, p))

    def entropy(b, k, p):
        """Per channel for sigmoids; for a softmax the cross-entropy of the pixel, whatever k."""
        if softmax:
            return -math.log(probability(b, int(target[(b, *p)]), p))
        t, q = truth(b, k, p), probability(b, k, p)
        return -t * math.log(q) - (1 - t) * math.log(1 - q)

    def pixel_weight(b, k, p):
        if labels is REGIONS:
            return weight[k]
        return weight[int(target[(b, *p)])]

    def own(b, k, p):
        return int(target[(b, *p)]) if softmax else k

    columns = [0] if softmax else range(channels)  # channels of a pixel term
    valid = [[p for p in points if counts(b, p)] for b in range(batch)]

    def weighted(term, images, ks):
        triples = [(b, k, p) for b in images for k in ks for p in valid[b]]
        return sum(term(*i) * pixel_weight(*i) for i in triples) / sum(pixel_weight(*i) for i in triples)

    def over_channels(values, background=False):
        """Mean of values[b][k] by channel weight."""
        if labels is BINARY:
            return np.mean(values)
        ks = list(range(channels)) if background or not softmax else list(range(1, channels))
        return sum(weight[k] * row[k] for row in values for k in ks) / (len(values) * sum(weight[k] for k in ks))

    if name == "bce":
        return weighted(entropy, range(batch), columns)
    if name == "focal":

        def modulated(b, k, p):
            k = own(b, k, p)
            right = probability(b, k, p) if truth(b, k, p) else 1 - probability(b, k, p)
            return entropy(b, k, p) * (1 - right) ** config["gamma"]

        return weighted(modulated, range(batch), columns)
    if name == "structure":
        overlap = [[None] * channels for _ in range(batch)]
        for b, k in itertools.product(range(batch), range(channels)):
            inter = sum(probability(b, k, p) * truth(b, k, p) * border(b, k, p) for p in valid[b])
            union = sum((probability(b, k, p) + truth(b, k, p)) * border(b, k, p) for p in valid[b])
            overlap[b][k] = 1 - (inter + 1) / (union - inter + 1)
        if not config["pixel_weighted_bce"]:
            return weighted(entropy, range(batch), columns) + over_channels(overlap)
        per_image = [[0.0] * channels for _ in range(batch)]
        for b, k in itertools.product(range(batch), columns):
            w = [border(b, own(b, k, p), p) * pixel_weight(b, k, p) for p in valid[b]]
            per_image[b][k] = sum(v * entropy(b, k, p) for v, p in zip(w, valid[b], strict=True)) / sum(w)
        pixel = np.mean([row[0] for row in per_image]) if softmax else over_channels(per_image)
        return pixel + over_channels(overlap)
    # Dice and Tversky
    smooth = config.get("smooth", 1e-5)
    groups = [list(range(batch))] if config.get("batch") else [[b] for b in range(batch)]
    values = []
    for group in groups:
        row = []
        for k in range(channels):
            pixels = [(b, k, p) for b in group for p in valid[b]]
            tp = sum(probability(*i) * truth(*i) for i in pixels)
            fp = sum(probability(*i) * (1 - truth(*i)) for i in pixels)
            fn = sum((1 - probability(*i)) * truth(*i) for i in pixels)
            if name == "dice":
                row.append(1 - (2 * tp + smooth) / (2 * tp + fp + fn + smooth))
            else:
                row.append(1 - (tp + smooth) / (tp + config["alpha"] * fp + config["beta"] * fn + smooth))
        values.append(row)
    return over_channels(values, config.get("include_background", False))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_equals_the_loops(config, kind, weighted):
    labels, weights = KINDS[kind], WEIGHTS[kind] if weighted else None
    if kind == "binary" and weighted and config["name"] in ("dice", "tversky"):
        with pytest.raises(UserError, match="class_weights have no effect"):
            build_loss({**config, "class_weights": weights}, labels)
        return
    logits, target = case(labels)
    loss = build_loss({**config, "class_weights": weights}, labels)(logits, target)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(oracle(config, labels, logits, target, weights), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_volumes_equal_the_loops(config, kind):
    logits, target = case(KINDS[kind], (2, 2, 3, 5))
    loss = build_loss(config, KINDS[kind])(logits, target)
    assert loss.item() == pytest.approx(oracle(config, KINDS[kind], logits, target, None), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_ignored_pixels_change_nothing(config, kind):
    labels = KINDS[kind]
    logits, target = case(labels)
    criterion = build_loss({**config, "deep_supervision": [1, 0.5]}, labels)
    out = target == IGNORE
    assert 0 < out.sum() < out.numel()

    def run(fill):
        moved = torch.where(out.unsqueeze(1), torch.as_tensor(fill, dtype=logits.dtype), logits).requires_grad_()
        loss = criterion((moved, moved), target)
        (gradient,) = torch.autograd.grad(loss, moved)
        return loss.item(), gradient

    reference, gradient = run(0.3)
    assert gradient.movedim(1, -1)[out].abs().max() == 0
    assert gradient.movedim(1, -1)[~out].abs().min() > 0
    for fill in (-50.0, 1e30, math.inf, math.nan):
        loss, moved = run(fill)
        assert loss == reference
        assert torch.equal(moved, gradient)
    inside = logits.clone()
    inside.movedim(1, -1)[~out] += 0.1 * torch.arange(1, labels.channels + 1)
    assert criterion((inside, inside), target).item() != reference, "this test cannot fail"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_a_batch_without_labelled_pixels_costs_nothing(config, kind):
    logits, target = case(KINDS[kind])
    logits.requires_grad_()
    loss = build_loss(config, KINDS[kind])(logits, torch.full_like(target, IGNORE))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_gradients(config, kind):
    logits, target = case(KINDS[kind], (2, 3, 4))
    criterion = build_loss({**config, "class_weights": None}, KINDS[kind])
    torch.autograd.gradcheck(lambda x: criterion(x, target), logits.requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_half_precision_is_computed_in_float32(config, kind):
    logits, target = case(KINDS[kind], (2, 40, 50), dtype=torch.float32)
    criterion = build_loss(config, KINDS[kind])
    half = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(half, target)
    assert loss.dtype == torch.float32
    assert loss.item() == criterion(half.float(), target).item()
    assert loss.item() == pytest.approx(criterion(half.double(), target).item(), rel=1e-5)


def test_autocast_does_not_reach_a_criterion():
    def criterion(logits, target, valid):
        product = logits.flatten(2) @ target.flatten(2).transpose(1, 2)  # autocast would make it bfloat16
        return product.sum()

    logits, target = case(BINARY, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = SegmentationLoss(Classes(BINARY), criterion)(logits, target)
        assert criterion(logits, logits, None).dtype == torch.bfloat16, "this test cannot fail"
    assert loss.item() == SegmentationLoss(Classes(BINARY), criterion)(logits, target).item()


@pytest.mark.parametrize("scale", [1e-6, 100.0, 1e4, 1e20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_extreme_logits_stay_finite(config, kind, scale):
    logits, target = case(KINDS[kind], dtype=torch.float32)
    logits = (logits.sign() * scale).requires_grad_()
    loss = build_loss(config, KINDS[kind])(logits, target)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_a_right_answer_costs_less(config):
    for labels in KINDS.values():
        _, target = case(labels, ignored=False)
        right = 20.0 * (2 * labels.onehot(target, axis=1).double() - 1)
        criterion = build_loss(config, labels)
        assert criterion(right, target).item() < 1e-3 < criterion(0 * right, target).item()


# Golden cases


def golden_module():
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("form", "weighted"), [("loss_official", False), ("loss_per_pixel", True)])
@pytest.mark.parametrize("index", [0, 1])
def test_structure_loss_is_the_official_one(index, form, weighted):
    fill = golden_module()
    facts = json.loads((GOLDEN / "pranet/structure_loss.json").read_text())["cases"][index]
    reference = np.load(GOLDEN / "pranet/structure_loss.npz")[f"case{index}/{form}"].item()
    seed, shape = facts["input_seed"], facts["input_shape"]
    logits = 2 * torch.from_numpy(fill.make_input(seed, shape))
    noise = torch.from_numpy(fill.make_input(seed + 1000, shape))
    mask = (F.avg_pool2d(noise, 9, stride=1, padding=4) > 0).float()
    criterion = build_loss({"name": "structure", "pixel_weighted_bce": weighted}, BINARY)
    tolerance = max(20 * facts["outputs"][form]["noise"], 5e-6)
    for target in (mask, mask[:, 0].to(torch.uint8)):
        assert abs(criterion(logits, target).item() - reference) <= tolerance * abs(reference)
    other = build_loss({"name": "structure", "pixel_weighted_bce": not weighted}, BINARY)(logits, mask).item()
    assert abs(other - reference) > 10 * tolerance * abs(reference), "the two forms cannot be told apart"


# MONAI as a second witness, where it can express the same thing


@pytest.mark.parametrize("include_background", [False, True])
def test_dice_ce_is_monais_for_classes(include_background):
    from monai.losses.dice import DiceCELoss

    logits, target = case(CLASSES, ignored=False, dtype=torch.float32)
    theirs = DiceCELoss(include_background=include_background, softmax=True, to_onehot_y=True)
    ours = build_loss({"name": "dice_ce", "include_background": include_background}, CLASSES)
    assert ours(logits, target).item() == pytest.approx(theirs(logits, target.unsqueeze(1).long()).item(), rel=1e-6)


def test_dice_ce_is_monais_for_one_channel():
    from monai.losses.dice import DiceCELoss

    logits, target = case(BINARY, ignored=False, dtype=torch.float32)
    theirs = DiceCELoss(sigmoid=True)(logits, target.unsqueeze(1).float())
    assert build_loss({"name": "dice_ce"}, BINARY)(logits, target).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_focal_is_monais(kind):
    from monai.losses.focal_loss import FocalLoss

    labels = KINDS[kind]
    logits, target = case(labels, ignored=False, dtype=torch.float32)
    theirs = FocalLoss(gamma=3.0, use_softmax=kind == "softmax")(logits, labels.onehot(target, axis=1).float()).item()
    # MONAI averages over the channels too, though a softmax has one term per pixel.
    theirs *= 3 if kind == "softmax" else 1
    assert build_loss({"name": "focal", "gamma": 3.0}, labels)(logits, target).item() == pytest.approx(theirs, rel=1e-5)


# Outputs, targets


def test_outputs_are_resized_weighted_and_added():
    _, target = case(BINARY, (2, 12, 20), ignored=False)
    maps = [torch.randn(2, 1, *size, dtype=torch.float64) for size in ((12, 20), (6, 10), (3, 5))]
    single = build_loss({"name": "bce"}, BINARY)
    resized = [F.interpolate(m, size=(12, 20), mode="bilinear", align_corners=False) for m in maps]
    singles = [single(m, target).item() for m in resized]
    assert single(tuple(maps), target).item() == pytest.approx(sum(singles))
    weighted = build_loss({"name": "bce", "deep_supervision": [1, 0.5, 0]}, BINARY)
    assert weighted(tuple(maps), target).item() == pytest.approx(singles[0] + 0.5 * singles[1])
    volume = torch.randn(2, 1, 2, 3, 5, dtype=torch.float64)
    assert single(volume, torch.zeros(2, 4, 6, 10, dtype=torch.uint8)).item() > 0
    with pytest.raises(UserError, match=r"deep_supervision has 3 weights, but the network has 1 output"):
        weighted(maps[0], target)


@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_soft_targets(config):
    criterion = build_loss(config, BINARY)
    logits, target = case(BINARY)
    soft = target.double().unsqueeze(1)
    for mark in (-1.0, math.nan):
        marked = soft.clone()
        marked[soft == IGNORE] = mark
        assert criterion(logits, marked).item() == pytest.approx(criterion(logits, target).item(), rel=1e-6)
    assert criterion(logits, torch.full_like(soft, 0.5)).item() > 0


@pytest.mark.parametrize("config", [c for c in CONFIGS if c["name"] != "structure"], ids=config_id)
def test_a_soft_target_is_best_met_by_itself(config):
    generator = torch.Generator().manual_seed(3)
    soft = 0.1 + 0.8 * torch.rand(2, 1, 4, 5, generator=generator, dtype=torch.float64)
    criterion = build_loss(config, BINARY)
    best = torch.logit(soft)
    for shift in (-0.5, 0.5):
        assert criterion(best, soft) < criterion(best + shift, soft)


def test_targets_that_do_not_fit():
    logits, target = case(CLASSES)
    criterion = build_loss({"name": "bce"}, CLASSES)
    with pytest.raises(ValueError, match="soft target is for binary"):
        criterion(logits, target.double().unsqueeze(1))
    with pytest.raises(ValueError, match="do not fit"):
        criterion(logits[:, :2], target)
    with pytest.raises(ValueError, match="do not fit"):
        criterion(logits, target.unsqueeze(1))


def test_copies_and_devices():
    criterion = build_loss({"name": "dice_ce", "class_weights": {"core": 2}}, CLASSES)
    assert list(criterion.state_dict()) == [], "a loss has nothing to save"
    assert [tuple(b.shape) for b in criterion.buffers()] == [(3,)], "but its weights follow the device"
    logits, target = case(CLASSES)
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert twin(logits, target).item() == criterion(logits, target).item()


# Mistakes


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "the key 'name' is missing"),
        ({"name": "strukture"}, "Did you mean 'structure'"),
        ({"name": "focal", "gama": 2}, "Did you mean 'gamma'"),
        ({"name": "bce", "class_weight": {}}, "Did you mean 'class_weights'"),
        ({"name": "focal", "gamma": "2"}, "gamma must be like 2.0"),
        ({"name": "focal", "gamma": True}, "gamma must be like 2.0"),
        ({"name": "focal", "gamma": -1}, "at least 0"),
        ({"name": "focal", "gamma": 0.5}, "0 or at least 1"),
        ({"name": "focal", "gamma": float("nan")}, "at least 0"),
        ({"name": "structure", "pixel_weighted_bce": 1}, "must be like True"),
        ({"name": "dice", "smooth": 0}, "smooth must be above 0"),
        ({"name": "bce", "deep_supervision": []}, "deep_supervision needs"),
        ({"name": "bce", "deep_supervision": [0, 0]}, "not all 0"),
        ({"name": "bce", "deep_supervision": [1, -1]}, "deep_supervision needs"),
        ({"name": "bce", "deep_supervision": 1}, "deep_supervision needs"),
        ({"name": "bce", "class_weights": [1, 2]}, "names with numbers"),
        ({"name": "bce", "class_weights": {"coer": 2}}, "Did you mean 'core'"),
        ({"name": "bce", "class_weights": {"core": "2"}}, "'core' needs a number"),
        ({"name": "bce", "class_weights": {"core": -2}}, "'core' needs a number"),
        ({"name": "bce", "class_weights": {"background": 0, "edema": 0, "core": 0}}, "nothing to learn"),
        ({"name": "dice", "class_weights": {"edema": 0, "core": 0}}, "no foreground class"),
    ],
)
def test_mistakes_are_explained(config, text):
    with pytest.raises(UserError) as error:
        build_loss(config, CLASSES)
    assert text in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_every_loss_is_covered_here():
    assert {config["name"] for config in CONFIGS} == set(LOSSES)
    for name in LOSSES:
        check_loss({"name": name})


def test_monai_is_imported_only_where_it_is_used(monkeypatch):
    """Its import takes seconds."""
    for module in ("monai", "monai.losses", "monai.losses.dice", "monai.losses.tversky"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises now
    for name in ("structure", "bce", "focal"):
        build_loss({"name": name}, BINARY)
    for name in ("dice", "dice_ce", "tversky"):
        with pytest.raises(ImportError):
            build_loss({"name": name}, BINARY)
