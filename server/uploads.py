"""Adapters by upload: a multipart body streamed to a temporary folder, then the checks of every import, then published.

Nothing that a client names becomes a path: a part's name chooses among fixed file names, its file name is ignored.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from adapters.errors import DeadlineExceededError, InvalidInputError, InvalidNameError, OverloadedError
from adapters.imports import import_folder
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE, REWARD_HEAD_FILE
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.settings import CoreSettings

__all__ = ["FILE_PARTS", "Uploads"]

FILE_PARTS = {
    "adapter_config": ADAPTER_CONFIG_FILE,
    "adapter_model": ADAPTER_WEIGHTS_FILE,
    "manifest": MANIFEST_FILE,
    "reward_head": REWARD_HEAD_FILE,
}
_REQUIRED_PARTS = ("alias", "adapter_config", "adapter_model")
_FIELD_PARTS = frozenset({"alias", "promote"})
_MAX_FIELD_BYTES = 256
_MAX_IMPORTS = 2  # each may hold all its weights in memory
_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class _Upload:
    alias: str
    promote: bool


class Uploads:
    """Takes adapters from multipart bodies, and bounds uploads of every kind: so many at a time, each in its time.

    Args:
        core: Names the base model that they must fit.
        timeout_s: Seconds that one body may take to arrive: a sender who stops must not hold a place for ever.
    """

    def __init__(self, core: CoreSettings, *, timeout_s: float) -> None:
        self._core = core
        self._timeout_s = timeout_s
        self._num_running = 0

    async def take(self, request: Request, registry: Registry) -> tuple[NumberedVersion, bool]:
        """Receive, check and publish one adapter; whatever is wrong, nothing is published and nothing is left.

        Args:
            request: Its body has not been read.
            registry: Where to publish, on behalf of whoever sends.

        Returns:
            The version, and whether its alias points to it.

        Raises:
            InvalidInputError: the body has another form than it should.
            AdapterRejectedError: the adapter can't be served here; says why.
            OverloadedError: others are being imported.
            DeadlineExceededError: the body did not arrive in time.
        """
        with self.place(_MAX_IMPORTS), tempfile.TemporaryDirectory(prefix="hotswap-upload-") as name:
            folder = Path(name)
            upload = await self._receive(request, folder)
            return await asyncio.to_thread(
                import_folder, folder, upload.alias, core=self._core, registry=registry, promote=upload.promote
            )

    @contextmanager
    def place(self, most: int) -> Iterator[None]:
        """Hold one of `most` places for uploads of any kind, each of which may fill a disk.

        Raises:
            OverloadedError: all of them are taken.
        """
        if self._num_running >= most:
            raise OverloadedError(f"{self._num_running} uploads are under way, which is all at a time")
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    @asynccontextmanager
    async def arriving(self) -> AsyncIterator[None]:
        """Around the reading of a body.

        Raises:
            InvalidInputError: its sender hung up.
            DeadlineExceededError: it did not arrive in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except ClientDisconnect:
            raise InvalidInputError("the body broke off") from None
        except TimeoutError:
            raise DeadlineExceededError(f"the body did not arrive in {self._timeout_s:g} seconds") from None

    async def _receive(self, request: Request, folder: Path) -> _Upload:
        parts = _Parts(folder)
        try:
            parser = _make_parser(request, parts)
            async with self.arriving():
                async for chunk in request.stream():
                    # In a thread: a slow disk must not hold up everybody's streams.
                    await asyncio.to_thread(parser.write, chunk)
            parser.finalize()
        except FormParserError as error:
            raise InvalidInputError(f"the body is not multipart/form-data: {error}") from None
        finally:
            parts.close()
        return parts.to_upload()


def _make_parser(request: Request, parts: _Parts) -> MultipartParser:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        shown = request.headers.get("content-type", "nothing")[:80]
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
            "on_part_end": parts.end,
            "on_end": parts.finish,
        },
    )


class _Parts:
    """What the parser calls: writes file parts into the folder and keeps the short fields."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fields: dict[str, bytearray] = {}
        self._file: BinaryIO | None = None
        self._seen: set[str] = set()
        self._name = ""
        self._disposition = b""
        self._header = (bytearray(), bytearray())
        self._is_complete = False

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
        if name in self._seen:
            raise InvalidInputError(f"the part {name!r} is given twice", param=name)
        if name in FILE_PARTS:
            self._file = (self._folder / FILE_PARTS[name]).open("xb")
        elif name in _FIELD_PARTS:
            self._fields[name] = bytearray()
        else:
            known = ", ".join(sorted([*FILE_PARTS, *_FIELD_PARTS]))
            raise InvalidInputError(f"unknown part {name[:80]!r}: expected some of {known}", param=name[:80] or None)
        self._seen.add(name)

    def write(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
            return
        field = self._fields[self._name]
        field.extend(data[start:end])
        if len(field) > _MAX_FIELD_BYTES:
            raise InvalidInputError(f"{self._name} is longer than {_MAX_FIELD_BYTES} bytes", param=self._name)

    def end(self) -> None:
        self.close()

    def finish(self) -> None:
        self._is_complete = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def to_upload(self) -> _Upload:
        if not self._is_complete:
            raise InvalidInputError("the body ends before its last boundary")
        for name in _REQUIRED_PARTS:
            if name not in self._seen:
                raise InvalidInputError(f"the part {name!r} is missing", param=name)
        return _Upload(self._alias(), self._promote())

    def _alias(self) -> str:
        try:
            return check_alias_name(self._text("alias"))
        except InvalidNameError as error:
            # Elsewhere a name that can't exist is not found; here it is one to be made.
            raise InvalidInputError(str(error), param="alias") from None

    def _promote(self) -> bool:
        if "promote" not in self._fields:
            return True
        if (given := self._text("promote")) not in _FLAGS:
            raise InvalidInputError(f"promote: expected true or false, found {given[:40]!r}", param="promote")
        return _FLAGS[given]

    def _text(self, name: str) -> str:
        return self._fields[name].decode("utf-8", "replace")
