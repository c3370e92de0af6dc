"""One look at every image or volume of data to classify."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from visattn.data.cases import Case
from visattn.data.class_cases import LabelledCase
from visattn.data.class_preprocessing import with_channels
from visattn.data.medmnist_file import case_rank
from visattn.doctor.findings import Findings
from visattn.doctor.reading import Heard, Seen, digest_of, image_print, look_at_all
from visattn.survey import Facts, look_at_image

Images = Mapping[str, NDArray[np.uint8]]
"""The arrays of an .npz file by part: (N, H, W), (N, H, W, 3), or of volumes (N, D, H, W)."""


def look_at_files(cases: Sequence[Case]) -> list[Seen]:
    """Look at image files, in threads."""

    def look(case: Case, heard: Heard) -> Seen:
        heard.path = case.image
        facts, image = look_at_image(case.image)
        kept = None if image is None else image_print(image, None)
        return Seen(case, facts, Facts(case.image, None), digest_of(case.image), b"", kept, None, ())

    return look_at_all(cases, look)


def look_at_arrays(
    cases: Sequence[Case], labelled: Sequence[LabelledCase], images: Images, findings: Findings
) -> list[Seen]:
    """Look at the images of arrays; of volumes only the bytes, which tell copies, and whether they are constant."""
    places = {case.name: (case.part, case.index) for case in labelled}

    def look(case: Case, heard: Heard) -> Seen:
        part, index = places[case.name]
        image = images[part][index]
        digest = hashlib.sha256(np.ascontiguousarray(image).data).digest()
        flat = case_rank(image.shape) == 2
        facts = Facts(case.image, (image.shape[0], image.shape[1]) if flat else None)
        # Constant ones are told as such; to call each of them a copy of the others would say nothing.
        if int(image.min()) == int(image.max()):
            return Seen(case, facts, facts, b"", b"", None, None, ())
        kept = image_print(np.ascontiguousarray(with_channels(image, 2, 3)), None) if flat else None
        return Seen(case, facts, facts, digest, b"", kept, None, ())

    seen = look_at_all(cases, look)
    for one in seen:
        if not one.digest:
            findings.file("constant-image", one.case.image)
    return seen
