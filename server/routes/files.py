"""/v1/files: training data in, results out."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request

from adapters.errors import InvalidInputError
from adapters.files import TRAINING_PURPOSE, FileService
from adapters.records import StoredFile
from server.auth import needs
from server.fine_tuning_schemas import FilesQuery, file_body, page_body
from server.forms import Form, FormShape
from server.services import CurrentServices
from server.streaming import ClosingStreamingResponse

__all__ = ["router"]

router = APIRouter(dependencies=[needs("train")])
_PIECE_BYTES = 1 << 16
_SHAPE = FormShape(files={"file": "content"}, fields=frozenset({"purpose"}), max_field_bytes=1000)
_FORM = {  # the body is read by hand, so that its parts are bounded
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": [TRAINING_PURPOSE]},
                },
            }
        }
    },
}


@router.post("/v1/files", openapi_extra={"requestBody": _FORM})
async def upload_file(request: Request, services: CurrentServices) -> dict[str, Any]:
    """Check training data and keep it. The form goes to the disk while it is read, never into memory."""
    if "charset" in request.headers.get("content-type", "").lower():
        raise InvalidInputError("content-type: expected no charset; names in forms are UTF-8", param="file")
    async with services.uploads.received(request, _SHAPE) as form:
        _check_form(form)
        return file_body(await services.uploads.run(_keep, services.files, form))


@router.get("/v1/files")
async def list_files(query: Annotated[FilesQuery, Query()], services: CurrentServices) -> dict[str, Any]:
    """Files, newest first unless `order` says otherwise."""
    files, has_more = await asyncio.to_thread(
        services.files.list, limit=query.limit, after=query.after, purpose=query.purpose, order=query.order
    )
    return page_body([file_body(file) for file in files], has_more=has_more)


@router.get("/v1/files/{file_id}")
async def retrieve_file(file_id: str, services: CurrentServices) -> dict[str, Any]:
    """One file."""
    return file_body(await asyncio.to_thread(services.files.get, file_id))


@router.get("/v1/files/{file_id}/content")
async def download_file(file_id: str, services: CurrentServices) -> ClosingStreamingResponse:
    """A file's bytes."""
    content = await asyncio.to_thread(services.files.open, file_id)
    headers = {"content-length": str(os.fstat(content.fileno()).st_size)}
    return ClosingStreamingResponse(_pieces(content), media_type="application/octet-stream", headers=headers)


@router.delete("/v1/files/{file_id}")
async def delete_file(file_id: str, services: CurrentServices) -> dict[str, Any]:
    """Delete a file that no unfinished job needs."""
    await asyncio.to_thread(services.files.delete, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _check_form(form: Form) -> None:
    purpose = form.fields.get("purpose")
    if purpose != TRAINING_PURPOSE:
        found = "none" if purpose is None else f"{purpose!r:.60}"
        raise InvalidInputError(f"purpose: expected {TRAINING_PURPOSE!r}, found {found}", param="purpose")
    if not form.filenames.get("file"):
        raise InvalidInputError("file: expected a file with its name, found none", param="file")


def _keep(files: FileService, form: Form) -> StoredFile:
    with form.files["file"].open("rb") as content:
        return files.upload(content, form.filenames["file"])


def _pieces(content: IO[bytes]) -> Iterator[bytes]:
    with content:
        while piece := content.read(_PIECE_BYTES):
            yield piece
