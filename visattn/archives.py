"""Files of torch.save, looked at before torch reads them.

`weights_only=True` keeps such a file from executing anything. What is left are files of a few bytes that ask for any
amount of memory or time: compressed archives, and calls that torch permits, such as `bytearray(10**12)`.
"""

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from visattn.errors import UserError

PLAIN = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch (\w+Storage|Size)")
"""Objects that a checkpoint of visattn is made of, besides plain values."""

FOREIGN = re.compile(r"(?!(builtins|__builtin__) bytearray$).*", re.DOTALL)
"""Objects that weights from elsewhere may hold, as far as torch permits them."""

_SLOW_CODECS = ("punycode", "idna")  # time grows with the square of a text; NumPy's numbers are saved as text in latin1

_LEGACY = 5  # pickles at the start of a file of torch before 1.6


def check_saved(path: Path, permitted: re.Pattern[str]) -> None:
    """Refuse a file of torch.save that is compressed or damaged, or that would make other objects than permitted.

    Args:
        path: The file; one of another kind passes, for torch to refuse.
        permitted: `PLAIN` or `FOREIGN`.

    Raises:
        UserError: It is compressed, which torch never does: a few bytes can unfold to any size.
        zipfile.BadZipFile: A checksum differs; torch reads a tensor with flipped bits in silence.
        pickle.UnpicklingError: It holds another object; the message has the word GLOBAL, as torch's own.
        OSError: It cannot be read.
    """
    with path.open("rb") as handle:
        archived = handle.read(4) == b"PK\x03\x04"
        if not archived:
            handle.seek(0)
            for _ in range(_LEGACY):
                if not _check_pickle(pickletools.genops(handle), permitted):
                    return
    if not archived:
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path}: not written by torch.save (its content is compressed).\nDo not use it.")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("wrong checksum")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickle(pickletools.genops(archive.read(entry)), permitted)


def _check_pickle(
    operations: Iterable[tuple[pickletools.OpcodeInfo, object, int | None]], permitted: re.Pattern[str]
) -> bool:
    """Whether the pickle could be read to its end."""
    try:
        for operation, argument, _ in operations:
            named = str(argument) if operation.name == "GLOBAL" else operation.name
            if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not permitted.fullmatch(named):
                raise pickle.UnpicklingError(f"GLOBAL {named}")
            # Python finds a codec whatever the case, with signs and letters beyond ASCII left out.
            if isinstance(argument, str) and re.sub(r"[^a-z0-9]", "", argument.lower()) in _SLOW_CODECS:
                raise pickle.UnpicklingError(f"GLOBAL codec {argument}")
    except pickle.UnpicklingError:
        raise
    except Exception:  # whatever pickletools makes of bytes that are no pickle; torch refuses them by its own words
        return False
    return True
