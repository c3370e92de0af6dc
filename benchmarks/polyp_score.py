"""Scores one run of gpu_polyps.py on the test images, whatever trained it.

    python benchmarks/polyp_score.py NETWORK RUN OUT [--sheet N] KEY=VALUE ...

Writes RUN/test.json: every metric of every test case. With --sheet also OUT/overlays_NETWORK.png: N test images, the
same for every network, with the outlines of truth and prediction.
"""

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import cv2
import gpu_polyps
import numpy as np
import torch
import yaml
from torch import nn

from visattn.checkpoint import build_network, read_checkpoint
from visattn.data.image_mask_folder import ImageMaskFolder
from visattn.inference import predict_probabilities
from visattn.metrics import case_metrics
from visattn.overlay import draw_overlay, write_png

THRESHOLD = 0.5
TILE = (430, 360)  # pixels, height and width of a picture with its legend on the sheet


def load(network: str, run: Path) -> nn.Module:
    """The network with the weights of the best validation Dice, in eval mode."""
    if network == gpu_polyps.UNET:
        from polyp_unet import build

        unet = build()
        unet.load_state_dict(torch.load(run / "checkpoints" / "best.pt", weights_only=True)["state_dict"])
        return unet.eval()
    return build_network(read_checkpoint(run / "checkpoints" / "best.ckpt")).eval()


def best_epoch(run: Path) -> tuple[int, float]:
    """Epoch and validation Dice of the checkpoint: the first of the highest among the epochs that validated."""
    with (run / "metrics.csv").open(newline="") as handle:
        rows = [(int(row["epoch"]), float(row["val/dice"] or "nan")) for row in csv.DictReader(handle)]
    return max((row for row in rows if math.isfinite(row[1])), key=lambda row: (row[1], -row[0]))


def score(network: nn.Module, data: ImageMaskFolder) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """A row of metrics for each test case, and the predicted class indices."""
    device = next(network.parameters()).device
    rows, predictions = [], {}
    for batch in data.test_dataloader():
        truths = [target.numpy() for target in batch["target"]]
        images = batch["image"].to(device)
        found = predict_probabilities(network, images, [truth.shape for truth in truths], data.labels.activation)
        for case, truth, probability in zip(batch["case"], truths, found, strict=True):
            indices = data.labels.from_probabilities(probability, THRESHOLD)
            (row,) = case_metrics(indices, truth, data.labels, probability, suite="full")
            rows.append({"case": case, **row})
            predictions[case] = indices
    return rows, predictions


def sheet(
    data: ImageMaskFolder, predictions: dict[str, np.ndarray], rows: list[dict[str, Any]], count: int
) -> np.ndarray:
    """`count` test images, evenly spaced over the list, with outlines; (H, W, 3) RGB."""
    dice = {row["case"]: row["dice"] for row in rows}
    cases = data.cases["test"]
    chosen = [cases[index] for index in np.linspace(0, len(cases) - 1, count).round().astype(int)]
    tiles = []
    for case in chosen:
        image, truth = data.read_case(case)
        drawn = draw_overlay(image, predictions[case.name], data.labels, truth, f"Dice {dice[case.name] or 0:.2f}")
        scale = min(TILE[0] / drawn.shape[0], TILE[1] / drawn.shape[1])
        small = cv2.resize(drawn, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[: TILE[0], : TILE[1]]
        tiles.append(np.pad(small, ((0, TILE[0] - small.shape[0]), (0, TILE[1] - small.shape[1]), (0, 0))))
    columns = 4
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def main() -> None:
    """Parse, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=gpu_polyps.NETWORKS)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sheet", type=int, default=0)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    given = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in options.keys)}
    data = ImageMaskFolder(**{**gpu_polyps.recipe_of(options.network)["data"]["init_args"], **given})
    data.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load(options.network, options.run).to(device)
    rows, predictions = score(network, data)
    epoch, val_dice = best_epoch(options.run)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    result = {"best_epoch": epoch, "val_dice": val_dice, "parameters": parameters, "cases": rows}
    (options.run / "test.json").write_text(json.dumps(result))
    if options.sheet:
        options.output.mkdir(parents=True, exist_ok=True)
        picture = sheet(data, predictions, rows, options.sheet)
        write_png(options.output / f"overlays_{options.network}.png", picture)


if __name__ == "__main__":
    main()
