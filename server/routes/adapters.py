"""/v1/adapters: aliases and versions: list, show, import, export, promote, roll back, pin, unload, delete, history."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from adapters.archive import VersionArchive
from adapters.audit import AuditLog
from adapters.errors import ConflictError
from adapters.records import Alias, AliasChange, NumberedVersion, version_name
from server.auth import needs
from server.engine.residency import Residence
from server.resources import (
    ALIAS_PATTERN,
    AdapterDetail,
    AdapterObject,
    AfterNumber,
    AliasPath,
    ChangeObject,
    DeletedObject,
    ImportedObject,
    Page,
    PageLimit,
    PinObject,
    PinRequest,
    PromoteRequest,
    ResidencyObject,
    UnloadObject,
    VersionDetail,
    VersionObject,
    VersionPath,
    make_page,
)
from server.services import CurrentServices, Services
from server.streaming import ClosingStreamingResponse
from server.uploads import FILE_PARTS

__all__ = ["router"]

router = APIRouter(prefix="/v1/adapters", dependencies=[needs("adapters")])
_MAX_VERSIONS_SHOWN = 100

# FastAPI would spool the parts itself and only then ask us; the route reads the body, so its form is written here.
_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["alias"],
                    "anyOf": [{"required": ["adapter_config", "adapter_model"]}, {"required": ["archive"]}],
                    "properties": {
                        "alias": {"type": "string", "pattern": ALIAS_PATTERN, "description": "Name to publish under."},
                        "promote": {
                            "type": "string",
                            "enum": ["true", "false"],
                            "default": "true",
                            "description": "Whether the alias moves to it.",
                        },
                        **{
                            part: {"type": "string", "format": "binary", "description": f"The file {name}."}
                            for part, name in FILE_PARTS.items()
                        },
                    },
                }
            }
        },
    }
}
_TAR: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A tar archive: adapter_config.json, adapter_model.safetensors, manifest.json; of a reward "
        "model reward_head.safetensors, too.",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("")
async def list_adapters(
    services: CurrentServices,
    after: Annotated[
        str | None, Query(pattern=ALIAS_PATTERN, description="The alias to go on behind; it need not exist.")
    ] = None,
    limit: PageLimit = 20,
) -> Page[AdapterObject]:
    """The aliases in the order of their names."""

    def read() -> Page[AdapterObject]:
        pins = services.pins.names()
        found = services.registry.aliases(after=after or "", limit=limit + 1)
        data = [AdapterObject(**_adapter_fields(alias, pins)) for alias in found]
        return make_page(data, limit, lambda item: item.id)

    return await asyncio.to_thread(read)


@router.post("", status_code=201, openapi_extra=_UPLOAD)
async def import_adapter(request: Request, services: CurrentServices) -> ImportedObject:
    """Check a LoRA adapter in PEFT's layout as strictly as the engine will, and publish it.

    The parts' names are those of the fields here; their file names are ignored. With `manifest`, the adapter must be
    the one that it describes, made for this base model.
    """
    version, is_live = await services.uploads.take(request, services.registry)
    return ImportedObject(**_version_fields(version, services), is_live=is_live)


@router.get("/{alias}")
async def show_adapter(alias: AliasPath, services: CurrentServices) -> AdapterDetail:
    """One alias with the version that it points to, and its newest versions."""

    def read() -> AdapterDetail:
        found = services.registry.alias(alias)
        versions = services.registry.versions(alias)[: -_MAX_VERSIONS_SHOWN - 1 : -1]
        return AdapterDetail(
            **_adapter_fields(found, services.pins.names()),
            current=_detail(found.current, services),
            versions=[VersionObject(**_version_fields(version, services)) for version in versions],
        )

    return await asyncio.to_thread(read)


@router.delete("/{alias}")
async def delete_adapter(alias: AliasPath, services: CurrentServices) -> DeletedObject:
    """Delete an alias with all its versions; 409 while an experiment is running on it."""
    removed = await asyncio.to_thread(services.registry.remove, alias)
    return DeletedObject(id=alias, versions=removed)


@router.get("/{alias}/history")
async def list_changes(
    alias: AliasPath, services: CurrentServices, after: AfterNumber = 0, limit: PageLimit = 20
) -> Page[ChangeObject]:
    """Every move of an alias, the oldest first."""

    def read() -> Page[ChangeObject]:
        services.registry.alias(alias)
        found = services.registry.history(alias, after=after, limit=limit + 1)
        data = [_change(number, change) for number, change in enumerate(found, after + 1)]
        return make_page(data, limit, lambda item: item.id)

    return await asyncio.to_thread(read)


@router.get("/{alias}/versions")
async def list_versions(
    alias: AliasPath, services: CurrentServices, after: AfterNumber = 0, limit: PageLimit = 20
) -> Page[VersionObject]:
    """An alias's versions in the order of their numbers; `after` is a number."""

    def read() -> Page[VersionObject]:
        services.registry.alias(alias)
        found = services.registry.versions(alias, after=after, limit=limit + 1)
        data = [VersionObject(**_version_fields(version, services)) for version in found]
        return make_page(data, limit, lambda item: item.number)

    return await asyncio.to_thread(read)


@router.get("/{alias}/versions/{version}")
async def show_version(alias: AliasPath, version: VersionPath, services: CurrentServices) -> VersionDetail:
    """One version with its manifest."""
    return await asyncio.to_thread(lambda: _detail(services.registry.find(version_name(alias, version)), services))


@router.delete("/{alias}/versions/{version}")
async def delete_version(alias: AliasPath, version: VersionPath, services: CurrentServices) -> DeletedObject:
    """Delete one version; 409 while the alias points to it or an experiment is running on the alias."""
    removed = await asyncio.to_thread(services.registry.remove, version_name(alias, version))
    return DeletedObject(id=removed[0], versions=removed)


@router.get("/{alias}/versions/{version}/export", response_class=ClosingStreamingResponse, responses=_TAR)
async def export_version(alias: AliasPath, version: VersionPath, services: CurrentServices) -> ClosingStreamingResponse:
    """The version's files, checked against its manifest, as a tar archive: the same bytes every time."""

    def read() -> tuple[NumberedVersion, VersionArchive]:
        found = services.registry.find(version_name(alias, version))
        return found, VersionArchive(services.registry.store, found.version.digest)

    found, archive = await asyncio.to_thread(read)
    headers = {
        "content-length": str(archive.num_bytes),
        "content-disposition": f'attachment; filename="{found.alias}-v{found.number}.tar"',
        "etag": f'"{found.version.digest}"',
    }
    return ClosingStreamingResponse(iter(archive), media_type="application/x-tar", headers=headers)


@router.post("/{alias}/promote")
async def promote(alias: AliasPath, body: PromoteRequest, services: CurrentServices) -> AdapterObject:
    """Point an alias to one of its versions; requests that come from here on get it."""

    def move() -> AdapterObject:
        moved = services.registry.promote(version_name(alias, body.version))
        return AdapterObject(**_adapter_fields(moved, services.pins.names()))

    return await asyncio.to_thread(move)


@router.post("/{alias}/rollback")
async def rollback(alias: AliasPath, services: CurrentServices) -> AdapterObject:
    """Point an alias back to where it was before its last publish or promotion; repeated calls go further back."""

    def move() -> AdapterObject:
        moved = services.registry.rollback(alias)
        return AdapterObject(**_adapter_fields(moved, services.pins.names()))

    return await asyncio.to_thread(move)


@router.post("/{alias}/pin")
async def pin(alias: AliasPath, services: CurrentServices, body: PinRequest | None = None) -> PinObject:
    """Keep a version in a slot, also after a restart; without `version` whichever the alias points to."""
    await services.pins.pin(_name(alias, body), services.registry.database.actor)
    return await _pins_of(alias, services)


@router.post("/{alias}/unpin")
async def unpin(alias: AliasPath, services: CurrentServices, body: PinRequest | None = None) -> PinObject:
    """Undo a pin: that of the alias itself, or with `version` that of one version."""
    await services.pins.unpin(_name(alias, body), services.registry.database.actor)
    return await _pins_of(alias, services)


@router.post("/{alias}/unload", status_code=202)
async def unload(alias: AliasPath, services: CurrentServices, body: PinRequest | None = None) -> UnloadObject:
    """Free a version's slot once its last request has ended; 409 while it is pinned. Who asks later loads it again."""
    found = await asyncio.to_thread(services.registry.find, _name(alias, body))
    if found.version.digest in await asyncio.to_thread(services.pins.digests):
        raise ConflictError(f"{found.label} is pinned; unpin it first")
    await asyncio.to_thread(AuditLog(services.registry.database).record, "unload", found.label)
    await services.engine.unload(found.version.digest)
    return UnloadObject(id=found.label, digest=found.version.digest)


def _name(alias: str, body: PinRequest | None) -> str:
    return version_name(alias, None if body is None else body.version)


async def _pins_of(alias: str, services: Services) -> PinObject:
    return PinObject(id=alias, pinned=_of_alias(await asyncio.to_thread(services.pins.names), alias))


def _of_alias(pins: frozenset[str], alias: str) -> list[str]:
    return sorted(name for name in pins if name.partition("@")[0] == alias)


def _adapter_fields(alias: Alias, pins: frozenset[str]) -> dict[str, Any]:
    return {
        "id": alias.name,
        "version": alias.current.label,
        "updated_at": int(alias.updated_at.timestamp()),
        "num_versions": alias.num_versions,
        "experiment_id": alias.experiment_id,
        "pinned": _of_alias(pins, alias.name),
    }


def _version_fields(numbered: NumberedVersion, services: Services) -> dict[str, Any]:
    version = numbered.version
    return {
        "id": numbered.label,
        "alias": numbered.alias,
        "number": numbered.number,
        "digest": version.digest,
        "base_fingerprint": version.base_fingerprint,
        "rank": version.rank,
        "size_bytes": version.size_bytes,
        "source": version.source,
        "kind": version.kind,
        "published_at": int(version.published_at.timestamp()),
        "metrics": dict(version.metrics),
        "residency": None if services.engine.status is None else _residency(services.engine.residency, version.digest),
    }


def _detail(numbered: NumberedVersion, services: Services) -> VersionDetail:
    manifest = services.registry.store.read_manifest(numbered.version.digest)
    return VersionDetail(**_version_fields(numbered, services), manifest=manifest)


def _residency(known: Mapping[str, Residence], digest: str) -> ResidencyObject:
    found = known.get(digest) or Residence(digest)
    if found.slot is not None:
        place = "draining" if found.is_draining else "slot"
    elif found.is_loading:
        place = "loading"
    else:
        place = "host" if found.is_on_host else "store"
    return ResidencyObject(place=place, slot=found.slot, num_requests=found.num_requests, pinned=found.is_pinned)


def _change(number: int, change: AliasChange) -> ChangeObject:
    return ChangeObject(
        id=number,
        alias=change.alias,
        action=change.action,
        from_version=None if change.from_number is None else f"{change.alias}@v{change.from_number}",
        to_version=f"{change.alias}@v{change.to_number}",
        changed_at=int(change.changed_at.timestamp()),
    )
