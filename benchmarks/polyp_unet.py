"""The reference of gpu_polyps.py: segmentation_models_pytorch's Unet in a plain PyTorch loop, no Lightning.

Data, augmentation, order, image size, batch size, optimiser, learning rate, weight decay, schedule, warm-up, clipping,
precision and the choice of the checkpoint are those of a visattn recipe; network and loss (Dice + cross-entropy) are
segmentation_models_pytorch's own.

    python benchmarks/polyp_unet.py --recipe polyp_pranet --run DIR --epochs 80 --seed 0 KEY=VALUE ...

KEY=VALUE pairs replace init_args of the recipe's data, as root=DIR. Writes DIR/checkpoints/best.pt and DIR/metrics.csv.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import yaml
from torch import nn

from visattn.data.image_mask_folder import ImageMaskFolder
from visattn.inference import predict_probabilities
from visattn.metrics import case_metrics
from visattn.recipe import find_recipe, load_recipe

THRESHOLD = 0.5


def build() -> nn.Module:
    """Unet with a ResNet-34 encoder from scratch, one output channel."""
    return smp.Unet("resnet34", encoder_weights=None, in_channels=3, classes=1)


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def validate(network: nn.Module, data: ImageMaskFolder, device: torch.device) -> float:
    """Mean Dice over the validation cases at their own sizes."""
    network.eval()
    scores = []
    for batch in data.val_dataloader():
        truths = [target.numpy() for target in batch["target"]]
        found = predict_probabilities(network, batch["image"].to(device), [t.shape for t in truths], "sigmoid")
        for truth, probability in zip(truths, found, strict=True):
            indices = data.labels.from_probabilities(probability, THRESHOLD)
            scores.append(case_metrics(indices, truth, data.labels)[0]["dice"])
    defined = [score for score in scores if score is not None]
    return sum(defined) / len(defined)


def train(run: Path, recipe: dict, data: ImageMaskFolder, epochs: int, seed: int, validate_every: int = 1) -> None:
    """Train and keep the weights of the best validation Dice."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    network = build().to(device)
    dice, bce = smp.losses.DiceLoss("binary"), nn.BCEWithLogitsLoss()
    model, trainer = recipe["model"]["init_args"], recipe["trainer"]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=model["optimizer"]["lr"], weight_decay=model["optimizer"]["weight_decay"]
    )
    loader = data.train_dataloader()
    warmup = model["schedule"]["warmup_epochs"] * len(loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, epochs * len(loader), warmup)
    )
    half = device.type == "cuda" and trainer["precision"] == "bf16-mixed"
    best = -1.0
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    with (run / "metrics.csv").open("w", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(["epoch", "train/loss", "val/dice", "seconds"])
        for epoch in range(epochs):
            started = time.monotonic()
            network.train()
            loader.batch_sampler.set_epoch(epoch)
            total = torch.zeros((), device=device)
            for batch in loader:
                image = batch["image"].to(device, non_blocking=True)
                target = batch["target"].to(device, non_blocking=True)[:, None].float()
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    logits = network(image)
                loss = dice(logits.float(), target) + bce(logits.float(), target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), trainer["gradient_clip_val"])
                optimizer.step()
                schedule.step()
                total += loss.detach()
            due = (epoch + 1) % min(validate_every, epochs) == 0
            score = validate(network, data, device) if due else math.nan
            if score > best:
                best = score
                torch.save({"epoch": epoch, "state_dict": network.state_dict()}, run / "checkpoints" / "best.pt")
            table.writerow([epoch, float(total) / len(loader), score, time.monotonic() - started])
            handle.flush()


def main() -> None:
    """Parse, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="polyp_pranet")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--validate-every", type=int, default=1)
    parser.add_argument("data", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    recipe = load_recipe(find_recipe(options.recipe))
    given = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in options.data)}
    data = ImageMaskFolder(**{**recipe["data"]["init_args"], **given, "seed": options.seed})
    data.setup("fit")
    train(options.run, recipe, data, options.epochs, options.seed, options.validate_every)


if __name__ == "__main__":
    main()
