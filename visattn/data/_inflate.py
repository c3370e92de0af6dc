"""The content of gzip files in one pass: zlib itself compares checksum and length at the end of each member.

Python's `gzip` computes the checksum a second time and copies every byte once more.
"""

import zlib
from typing import IO, Protocol

_PIECE = 2**16  # compressed bytes that are read together


class Source(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes; fewer at the end alone."""
        ...


class Inflated:
    """The decompressed bytes of a gzip file of one or more members.

    Zeros behind a member are padding.

    Args:
        file: Stands at the first member.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rest = b""
        self._member = zlib.decompressobj(wbits=31)
        self._done = False

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes; fewer at the end alone.

        Raises:
            EOFError: The file ends within a member.
            zlib.error: What follows is damaged, or a checksum or length is wrong.
        """
        parts: list[bytes] = []
        while size and not self._done:
            piece = self._member.decompress(self._rest, size)
            parts.append(piece)
            size -= len(piece)
            self._rest = self._member.unconsumed_tail
            if self._member.eof:
                self._next_member(self._member.unused_data)
            elif not piece:  # all that was read is decompressed
                self._rest = self._file.read(_PIECE)
                if not self._rest:
                    raise EOFError
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next_member(self, rest: bytes) -> None:
        rest = rest.lstrip(b"\0")
        while not rest:
            piece = self._file.read(_PIECE)
            if not piece:
                self._done = True
                return
            rest = piece.lstrip(b"\0")
        self._rest = rest
        self._member = zlib.decompressobj(wbits=31)
