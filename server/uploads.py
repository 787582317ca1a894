"""Uploads of every kind: a multipart body streamed to a folder, then checked and kept, in threads of their own.

What arrives lies below the home folder: the system's folder for temporary files may be small, or in memory.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from starlette.requests import ClientDisconnect, Request

from adapters.disk import full_disk_told
from adapters.errors import DeadlineExceededError, InvalidInputError, InvalidNameError, OverloadedError
from adapters.imports import import_archive, import_folder
from adapters.manifest import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, MANIFEST_FILE, REWARD_HEAD_FILE
from adapters.records import NumberedVersion, check_alias_name
from adapters.registry import Registry
from adapters.settings import CoreSettings
from server.forms import Form, FormReader, FormShape

__all__ = ["FILE_PARTS", "MAX_UPLOADS", "Uploads", "sweep_uploads"]

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")

FILE_PARTS = {
    "adapter_config": ADAPTER_CONFIG_FILE,
    "adapter_model": ADAPTER_WEIGHTS_FILE,
    "manifest": MANIFEST_FILE,
    "reward_head": REWARD_HEAD_FILE,
    "archive": "archive.tar",
}
MAX_UPLOADS = 4  # of any kind, each of which may fill a disk
_MAX_IMPORTS = 2  # each may hold all its weights in memory
_ADAPTER_PARTS = ("adapter_config", "adapter_model", "manifest")
_OPTIONAL_PARTS = frozenset({"manifest"})
_ADAPTER = FormShape(files=FILE_PARTS, fields=frozenset({"alias", "promote"}), max_field_bytes=256)
_FLAGS = {"true": True, "false": False}


class Uploads:
    """Takes adapters from multipart bodies, and bounds uploads of every kind: so many at a time, each in its time.

    Args:
        core: Names the base model that adapters must fit, and the home folder.
        timeout_s: Seconds that one body may take to arrive: a sender who stops must not hold a place for ever.
    """

    def __init__(self, core: CoreSettings, *, timeout_s: float) -> None:
        self._core = core
        self._timeout_s = timeout_s
        self._num_running = 0
        self._folder = _folder_of(core.home)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Not the event loop's own threads: those look up the keys of all requests.
        self._threads = ThreadPoolExecutor(max_workers=MAX_UPLOADS, thread_name_prefix="upload")

    def close(self) -> None:
        """Give back the threads, when what they do has ended."""
        self._threads.shutdown()

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
        async with self.received(request, _ADAPTER, most=_MAX_IMPORTS) as form:
            alias, promote = _read_target(form)
            options: dict[str, Any] = {"core": self._core, "registry": registry, "promote": promote}
            if "archive" in form.files:
                return await self.run(import_archive, form.files["archive"], alias, **options)
            return await self.run(import_folder, form.folder, alias, **options)

    @asynccontextmanager
    async def received(self, request: Request, shape: FormShape, *, most: int = MAX_UPLOADS) -> AsyncIterator[Form]:
        """Read a form and yield it; its files are gone after the block.

        Args:
            request: Its body has not been read.
            shape: Which parts it may have.
            most: How many uploads of any kind there may be, this one among them.

        Raises:
            InvalidInputError: the body has another form than it should, or breaks off.
            OverloadedError: so many uploads are under way.
            DeadlineExceededError: the body did not arrive in time.
            StorageFullError: the disk is full.
        """
        with (
            self._place(most),
            full_disk_told(self._folder, "the upload"),
            tempfile.TemporaryDirectory(dir=self._folder) as name,
        ):
            yield await self._read(request, shape, Path(name))

    async def run(
        self, function: Callable[_Params, _Result], *args: _Params.args, **options: _Params.kwargs
    ) -> _Result:
        """Call a function in one of the threads for uploads, with what the caller's log lines say about the request."""
        context = contextvars.copy_context()
        call = functools.partial(context.run, function, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    @contextmanager
    def _place(self, most: int) -> Iterator[None]:
        if self._num_running >= most:
            raise OverloadedError(f"{self._num_running} uploads are under way, which is all at a time")
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    async def _read(self, request: Request, shape: FormShape, folder: Path) -> Form:
        reader = FormReader(request.headers.get("content-type"), shape, folder)
        try:
            async with asyncio.timeout(self._timeout_s):
                async for chunk in request.stream():
                    await self.run(reader.write, chunk)  # a slow disk must not hold up everybody's streams
        except ClientDisconnect:
            raise InvalidInputError("the body broke off") from None
        except TimeoutError:
            raise DeadlineExceededError(f"the body did not arrive in {self._timeout_s:g} seconds") from None
        finally:
            reader.close()
        return reader.finish()


def sweep_uploads(home: Path) -> int:
    """Delete what a server that was killed had received; call it before one begins, and while no other runs.

    Returns:
        How many uploads were deleted.
    """
    leftovers = list(_folder_of(home).glob("*"))
    for path in leftovers:
        shutil.rmtree(path)
    return len(leftovers)


def _folder_of(home: Path) -> Path:
    return home / "uploads"


def _read_target(form: Form) -> tuple[str, bool]:
    """The alias to publish under, and whether it moves."""
    _check_parts(form)
    try:
        alias = check_alias_name(form.fields["alias"])
    except InvalidNameError as error:
        # Elsewhere a name that can't exist is not found; here it is one to be made.
        raise InvalidInputError(str(error), param="alias") from None
    given = form.fields.get("promote", "true")
    if given not in _FLAGS:
        raise InvalidInputError(f"promote: expected true or false, found {given[:40]!r}", param="promote")
    return alias, _FLAGS[given]


def _check_parts(form: Form) -> None:
    is_archive = "archive" in form.seen
    for name in ("alias", *(() if is_archive else _ADAPTER_PARTS)):
        if name not in form.seen | _OPTIONAL_PARTS:
            raise InvalidInputError(f"the part {name!r} is missing", param=name)
    if is_archive and (doubled := form.seen.intersection(_ADAPTER_PARTS)):
        raise InvalidInputError(f"{min(doubled)}: is in the archive already; send one or the other", param=min(doubled))
