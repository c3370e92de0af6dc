"""Writes polyp_splits.json: which images of Kvasir-SEG and CVC-ClinicDB train, validate and test. Names only.

    python benchmarks/polyp_splits.py DATA

DATA holds kvasir_seg/ and cvc_clinicdb/, each with images/ and masks/. The result follows from the file names alone, so
everyone who has the images gets the same split:

* ClinicDB is cut at the ends of its video sequences. Neighbouring frames show the same polyp, so a random split would
  test on what was trained on. Of the whole set, the frames after the fifth sequence are left out.
* Kvasir-SEG has no sequences: of the names in alphabetical order every fifth tests, and every tenth, from the
  second on, validates.
"""

import argparse
import json
from pathlib import Path

KVASIR, CLINIC = "kvasir_seg", "cvc_clinicdb"
# Last frame of the first five of ClinicDB's 29 sequences, and where each sequence goes.
SEQUENCES = ((25, "train"), (50, "train"), (67, "test"), (78, "val"), (103, "test"))


def clinic_part(frame: int) -> str | None:
    """The part of a frame of CVC-ClinicDB; None beyond the sequences that are listed."""
    return next((part for last, part in SEQUENCES if frame <= last), None)


def kvasir_part(index: int) -> str:
    """The part of the image that stands at `index` in alphabetical order."""
    if index % 5 == 0:
        return "test"
    return "val" if index % 10 == 1 else "train"


def split(kvasir: list[str], clinic: list[str]) -> dict[str, list[str]]:
    """Names without suffix to parts of case names, as `data.split.files` takes them."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index, name in enumerate(sorted(kvasir)):
        parts[kvasir_part(index)].append(f"{KVASIR}/{name}")
    for frame in sorted(int(name) for name in clinic):
        part = clinic_part(frame)
        if part is not None:
            parts[part].append(f"{CLINIC}/{frame}")
    return parts


def main() -> None:
    """Write the file beside this script and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    data = parser.parse_args().data
    names = {folder: [path.stem for path in (data / folder / "images").iterdir()] for folder in (KVASIR, CLINIC)}
    parts = split(names[KVASIR], names[CLINIC])
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(parts, indent=1) + "\n")
    for part, cases in parts.items():
        counts = {folder: sum(case.startswith(f"{folder}/") for case in cases) for folder in (KVASIR, CLINIC)}
        print(f"{part:5} {counts}")


if __name__ == "__main__":
    main()
