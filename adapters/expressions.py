"""Regular expressions of users, matched in time linear in the text, whatever they are: RE2's, which Arrow carries.

Python's own can be hung by whoever writes them. What RE2 lacks for it (backreferences, looking around) is refused.
"""

from __future__ import annotations

__all__ = ["matches_whole", "search"]


def search(expression: str, text: str) -> bool:
    """Whether the expression matches somewhere in the text.

    Raises:
        ValueError: it is no expression.
    """
    # Arrow is a large library: whoever has no expression need not load it.
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return bool(pc.match_substring_regex(pa.scalar(text.encode("utf-8", "replace").decode()), expression).as_py())
    except pa.ArrowInvalid as error:
        raise ValueError(f"is no regular expression of RE2's: {error}") from None


def matches_whole(expression: str, text: str) -> bool:
    """Whether the expression matches the whole text; a dot takes line ends, too.

    Raises:
        ValueError: it is no expression.
    """
    search(expression, "")  # alone, so that no bracket of it closes the one around it
    return search(rf"(?s)\A(?:{expression})\z", text)
