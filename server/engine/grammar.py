"""What llguidance is asked: grammars, and the limits under which they are compiled and followed.

Run as a script, it reads a JSON schema, or with `--grammar` a grammar, from standard input and prints why it can't be
used, or nothing. A schema comes from outside, and compiling some takes for ever: the API process does it in a child
with limits. So this file imports nothing of ours, and nothing that is slow to import.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["LIMITS", "MAX_CHECK_S", "choices_grammar", "embedding_grammar", "json_grammar", "main"]

MAX_CHECK_S = 2  # of processor time; the largest honest schemas take 0.2 s
_MAX_CHECK_BYTES = 2**29  # of address space; an honest check takes a tenth of it

# A quarter of the defaults and less. With a vocabulary of 49,152 tokens the worst step of a hostile pattern takes 2 ms
# instead of 28, and the worst rejected grammar 16 ms; honest schemas need far less.
LIMITS = LLParserLimits(
    step_lexer_fuel=50_000,
    step_max_items=10_000,
    max_lexer_states=50_000,
    verbose_errors=False,  # an error would show the parser's insides
)

# Every option is given, so that a schema's own "x-guidance" decides nothing. White space is what `json.dumps` writes
# with or without an indent, and bounded: a model that is unsure must not fill the answer with blanks.
_JSON_OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n]{1,32}",
    "coerce_one_of": False,
    "lenient": False,
    "json_allow_general_unicode_escapes": False,
}


def json_grammar(schema: str) -> str:
    """The grammar of the JSON documents that a schema, given as text, allows.

    Raises:
        ValueError: the text is not a JSON object.
    """
    return LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)


def choices_grammar(choices: tuple[str, ...]) -> str:
    """The grammar of exactly these texts."""
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in choices))


def embedding_grammar(alternatives: Iterable[tuple[str, dict[str, Any], str]]) -> str:
    """The grammar of JSON documents between fixed texts: `(before, schema, behind)`, one of several."""
    rules = []
    for index, (before, schema, behind) in enumerate(alternatives):
        document = json.dumps({**schema, "x-guidance": _JSON_OPTIONS})
        rules.append(f"whole_{index}: {json.dumps(before)} json_{index} {json.dumps(behind)}\n")
        rules.append(f"json_{index}: %json {document}\n")
    names = " | ".join(f"whole_{index}" for index in range(len(rules) // 2))
    return f"start: {names}\n" + "".join(rules)


def main() -> None:
    """Check what is on standard input under limits of time and memory."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CHECK_S, MAX_CHECK_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_CHECK_BYTES, _MAX_CHECK_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        text = sys.stdin.read()
        grammar = LLMatcher.grammar_from_lark(text) if "--grammar" in sys.argv else json_grammar(text)
        sys.stdout.write(LLMatcher.validate_grammar(grammar, limits=LIMITS))
    except ValueError as error:
        sys.stdout.write(str(error))


if __name__ == "__main__":
    main()
