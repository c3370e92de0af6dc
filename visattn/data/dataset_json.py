"""dataset.json of the Medical Segmentation Decathlon and of nnU-Net, versions 1 and 2; and nnU-Net's splits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visattn.data.volume_names import ENDINGS
from visattn.errors import UserError

NAME = "dataset.json"
SPLITS = "splits_final.json"


@dataclass(frozen=True)
class DatasetJson:
    """What the file says, checked.

    Args:
        path: The file.
        version: `decathlon` or `nnunet`.
        channels: Names of the channels, where it names them.
        labels: The arguments of `Labels.from_config`, where it names labels.
        training: For each listed case the files of its channels and of its label, as written.
    """

    path: Path
    version: str
    channels: tuple[str, ...] | None
    labels: Mapping[str, Any] | None
    training: tuple[tuple[tuple[str, ...], str], ...]


def read_dataset_json(root: Path) -> DatasetJson | None:
    """Read the dataset.json of a folder; None where there is none, or it is that of something else.

    Raises:
        UserError: It cannot be read, or describes files of another format.
    """
    path = root / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({str(error)[:120]})") from None
    if not isinstance(content, dict) or not content.keys() & {"training", "channel_names", "file_ending", "dataset"}:
        return None
    ending = content.get("file_ending", ENDINGS[0])
    if ending not in ENDINGS:
        raise UserError(
            f"{path}: its files end in {ending!r}, but volumes are read from .nii and .nii.gz; convert them"
        )
    version = "nnunet" if content.keys() & {"channel_names", "file_ending", "dataset"} else "decathlon"
    channels = _channels(path, content.get("channel_names", content.get("modality")))
    labels = _labels(path, content["labels"], content.get("regions_class_order")) if "labels" in content else None
    return DatasetJson(path, version, channels, labels, _training(path, content))


def find_splits(root: Path) -> Path | None:
    """nnU-Net's splits of a data set: in its folder, or in that of the same name below nnUNet_preprocessed/."""
    root = root.resolve()
    raw = root.parent
    places = (
        root,
        raw.parent / "nnUNet_preprocessed" / root.name,
        raw.parent / raw.name.replace("raw", "preprocessed"),
    )
    for place in (*places[:2], places[2] / root.name):
        if (place / SPLITS).is_file():
            return place / SPLITS
    return None


def _channels(path: Path, entry: Any) -> tuple[str, ...] | None:
    if entry is None:
        return None
    names = entry
    if isinstance(entry, dict):
        if sorted(entry) != sorted(str(index) for index in range(len(entry))):
            raise UserError(f"{path}: its channels are numbered {', '.join(sorted(entry))}; they count from 0")
        names = [entry[str(index)] for index in range(len(entry))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f'{path}: its channels are no names: {entry!r:.80}; expected {{"0": "T1", "1": "FLAIR"}}')
    return tuple(names)


def _labels(path: Path, entry: Any, order: Any) -> Mapping[str, Any]:
    wrong = UserError(f'{path}: its labels are none: {entry!r:.120}; expected {{"background": 0, "tumour": 1}}')
    if not isinstance(entry, dict) or not entry:
        raise wrong
    if all(key.isdecimal() and isinstance(value, str) for key, value in entry.items()):
        return {"labels": {entry[key]: int(key) for key in sorted(entry, key=int)}}  # version 1
    values = [number for value in entry.values() for number in (value if isinstance(value, list) else [value])]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in values):
        raise wrong
    ignore = {"ignore": entry["ignore"]} if "ignore" in entry else {}
    named = {name: value for name, value in entry.items() if name != "ignore"}
    if order is None and not any(isinstance(value, list) for value in named.values()):
        return {"labels": dict(sorted(named.items(), key=lambda item: int(item[1]))), **ignore}
    # Regions: nnU-Net names those alone; the labels they are made of get a number for a name.
    parts = {name: value if isinstance(value, list) else [value] for name, value in named.items()}
    background = next((name for name, value in parts.items() if value == [0]), "background")
    numbers = sorted({number for value in parts.values() for number in value} - {0})
    regions = {name: [f"label {number}" for number in value] for name, value in parts.items() if name != background}
    return {"labels": {background: 0} | {f"label {n}": n for n in numbers}, "regions": regions, **ignore}


def _training(path: Path, content: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], str], ...]:
    listed: Any = content.get("training", [])
    if isinstance(content.get("dataset"), dict):
        listed = [{"image": case.get("images"), "label": case.get("label")} for case in content["dataset"].values()]
    entries = []
    for entry in listed if isinstance(listed, list) else [listed]:
        image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, dict) else (None, None)
        images = image if isinstance(image, list) else [image]
        if not images or not all(isinstance(name, str) for name in [*images, label]):
            raise UserError(
                f'{path}: an entry of its training cases is no {{"image": ..., "label": ...}}: {entry!r:.80}'
            )
        entries.append((tuple(images), str(label)))
    return tuple(entries)
