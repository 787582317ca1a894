"""Multipart bodies, streamed to a folder: which parts there may be is fixed, and nothing that a client names is a path.

A part's name chooses among file names of our own; the file name that a client gives is data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from adapters.errors import InvalidInputError

__all__ = ["Form", "FormReader", "FormShape"]

_MAX_SHOWN = 80


@dataclass(frozen=True, slots=True)
class FormShape:
    """Which parts a body may have.

    `files` maps a part's name to the file that it is written to; `fields` are short texts.
    """

    files: Mapping[str, str]
    fields: frozenset[str]
    max_field_bytes: int

    @property
    def names(self) -> list[str]:
        """Every part's name, in alphabetical order."""
        return sorted([*self.files, *self.fields])


@dataclass(slots=True)
class Form:
    """A body that has been read. `files` are in the folder, `filenames` what the client calls them."""

    folder: Path
    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    filenames: dict[str, str] = field(default_factory=dict)

    @property
    def seen(self) -> set[str]:
        """The names of all parts that came."""
        return {*self.fields, *self.files}


class FormReader:
    """Takes a body piece by piece. Call `write` for each, `finish` at the end, and `close` whatever happens.

    Args:
        content_type: The request's header, if it has one.
        shape: Which parts are expected.
        folder: Where files are written.

    Raises:
        InvalidInputError: the header is none of a form's.
    """

    def __init__(self, content_type: str | None, shape: FormShape, folder: Path) -> None:
        self._parts = _Parts(shape, folder)
        with _told_to_the_client():
            self._parser = _make_parser(content_type, self._parts)

    def write(self, piece: bytes) -> None:
        """Take the next piece; it may block on the disk.

        Raises:
            InvalidInputError: not the form that is expected; says where.
        """
        with _told_to_the_client():
            self._parser.write(piece)

    def finish(self) -> Form:
        """The whole form.

        Raises:
            InvalidInputError: the body ends too early.
        """
        if not self._parts.is_complete:
            raise InvalidInputError("the body ends before its last boundary")
        return self._parts.to_form()

    def close(self) -> None:
        """Close the file that is being written, if one is."""
        self._parts.close()


@contextmanager
def _told_to_the_client() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise InvalidInputError(f"the body is not multipart/form-data: {error}") from None


def _make_parser(content_type: str | None, parts: _Parts) -> MultipartParser:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        shown = (content_type or "nothing")[:_MAX_SHOWN]
        raise InvalidInputError(f"content-type: expected multipart/form-data with a boundary, found {shown!r}")
    return MultipartParser(
        options[b"boundary"],
        {
            "on_part_begin": parts.begin,
            "on_header_begin": parts.begin_header,
            "on_header_field": parts.add_header_name,
            "on_header_value": parts.add_header_value,
            "on_header_end": parts.end_header,
            "on_headers_finished": parts.open,
            "on_part_data": parts.write,
            "on_part_end": parts.close,
            "on_end": parts.finish,
        },
    )


class _Parts:
    """What the parser calls: writes file parts into the folder and keeps the short fields."""

    def __init__(self, shape: FormShape, folder: Path) -> None:
        self._shape = shape
        self._folder = folder
        self._fields: dict[str, bytearray] = {}
        self._filenames: dict[str, str] = {}
        self._file: BinaryIO | None = None
        self._name = ""
        self._disposition = b""
        self._header = (bytearray(), bytearray())
        self.is_complete = False

    def begin(self) -> None:
        self._name, self._disposition = "", b""

    def begin_header(self) -> None:
        self._header = (bytearray(), bytearray())

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)

    def open(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = name = options.get(b"name", b"").decode("utf-8", "replace")
        if name in self._fields or name in self._filenames:
            raise InvalidInputError(f"the part {name!r} is given twice", param=name)
        if name in self._shape.files:
            self._filenames[name] = options.get(b"filename", b"").decode("utf-8", "replace")
            self._file = (self._folder / self._shape.files[name]).open("xb")
        elif name in self._shape.fields:
            self._fields[name] = bytearray()
        else:
            shown, known = name[:_MAX_SHOWN], ", ".join(self._shape.names)
            raise InvalidInputError(f"unknown part {shown!r}: expected some of {known}", param=shown or None)

    def write(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        content = self._fields[self._name]
        content.extend(data[start:end])
        if len(content) > self._shape.max_field_bytes:
            raise InvalidInputError(
                f"{self._name} is longer than {self._shape.max_field_bytes} bytes", param=self._name
            )

    def finish(self) -> None:
        self.is_complete = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def to_form(self) -> Form:
        return Form(
            self._folder,
            fields={name: content.decode("utf-8", "replace") for name, content in self._fields.items()},
            files={name: self._folder / self._shape.files[name] for name in self._filenames},
            filenames=self._filenames,
        )
