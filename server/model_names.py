"""What `model` may name: aliases, versions, and the base model as `base` or by its own name."""

from __future__ import annotations

from adapters.records import BASE_MODEL_NAME, Binding
from adapters.registry import Registry

__all__ = ["names_base", "resolve_model"]


def resolve_model(registry: Registry, model: str, *, unit: str, base_name: str, arm: str | None = None) -> Binding:
    """Bind a request to what will answer it, to its last token; see `Registry.resolve`.

    Raises:
        InvalidNameError: the name breaks the grammar.
        NotFoundError: no such alias or version.
        InvalidInputError: no such arm.
    """
    name = BASE_MODEL_NAME if names_base(registry, model, base_name) else model
    return registry.resolve(name, unit=unit, arm=arm)


def names_base(registry: Registry, model: str, base_name: str) -> bool:
    """Whether a name is the base model's own, and means it for whoever the registry acts for.

    An alias of the same name goes first: somebody has published just that.
    """
    return model == base_name and registry.can_see(BASE_MODEL_NAME) and not registry.has_alias(model)
