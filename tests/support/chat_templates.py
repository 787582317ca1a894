"""Chat templates built as those of the model families are, each with a tokenizer of like control tokens.

What differs between families is what goes wrong: where the end of a turn is another token than the end of sequence,
where there is no system role, where earlier turns change once later ones follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["TEMPLATE_FAMILIES", "TemplateFamily", "make_family_tokenizer", "make_merging_tokenizer"]


def _as_it_is(content: str) -> str:
    return content


@dataclass(frozen=True)
class TemplateFamily:
    """One family.

    Args:
        name: What the tests call it.
        template: In Jinja.
        control: Its control tokens; BOS first, EOS second, of which a third may be the end of a turn.
        end_of_turn: The token that ends an assistant's turn.
        pad: Its padding token.
        spoken: What the assistant says for a message's content, without the end of turn.
        has_system: Whether a system message is accepted.
        has_tools: Whether tools, calls and their answers are shown.
        is_stable: Whether a conversation of several turns is one row.
    """

    name: str
    template: str
    control: tuple[str, ...]
    end_of_turn: str
    pad: str
    spoken: Callable[[str], str] = _as_it_is
    has_system: bool = True
    has_tools: bool = False
    is_stable: bool = True


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m['role'] == 'tool' else m['role'] }}"
    "<|end_header_id|>\n\n"
    "{% if tools and loop.first %}Functions: {% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% if m['tool_calls'] %}{% set call = m['tool_calls'][0]['function'] %}"
    '{"name": "{{ call["name"] }}", "parameters": {{ call["arguments"] | tojson }}}'
    "{% elif m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}{{ m['content'] | trim }}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}[INST] {{ system if SYSTEM_STANDS }}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant may speak') }}{% endif %}{% endfor %}"
)
_QWEN25 = (
    "<|im_start|>system\n{{ messages[0]['content'] if messages[0]['role'] == 'system' else 'You help.' }}"
    "{% if tools %}\n# Tools{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m['role'] == 'tool' %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m['content'] }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{% if m['content'] or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ call["function"]["name"] }}", '
    '"arguments": {{ call["function"]["arguments"] | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The last turn thinks, in an empty block if need be; the turns before have forgotten what they thought.
_QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# A conversation that is at its end gets the end-of-sequence token behind the end of its last turn.
_PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)


def _thinking(content: str) -> str:
    reasoning, mark, answer = content.rpartition("</think>")
    thought = reasoning.split("<think>")[-1].strip("\n") if mark else ""
    return f"<think>\n{thought}\n</think>\n\n" + answer.lstrip("\n")


def _behind_a_space(content: str) -> str:
    return f" {content}"


_IM = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
TEMPLATE_FAMILIES = {
    family.name: family
    for family in (
        TemplateFamily("chatml", _CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"),
        TemplateFamily(
            "llama3",
            _LLAMA3,
            ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
            "<|eot_id|>",
            "<|end_of_text|>",
            spoken=str.strip,
            has_tools=True,
        ),
        TemplateFamily(
            "mistral",
            _MISTRAL.replace("SYSTEM_STANDS", "loop.first"),
            ("<s>", "</s>", "[INST]", "[/INST]"),
            "</s>",
            "</s>",
            spoken=_behind_a_space,
        ),
        TemplateFamily(
            "mistral-system-last",
            _MISTRAL.replace("SYSTEM_STANDS", "m == turns | selectattr('role', 'equalto', 'user') | list | last"),
            ("<s>", "</s>", "[INST]", "[/INST]"),
            "</s>",
            "</s>",
            spoken=_behind_a_space,
            is_stable=False,
        ),
        TemplateFamily("qwen2.5", _QWEN25, _IM, "<|im_end|>", "<|endoftext|>", has_tools=True),
        TemplateFamily("qwen3", _QWEN3, _IM, "<|im_end|>", "<|endoftext|>", spoken=_thinking, is_stable=False),
        TemplateFamily(
            "gemma",
            _GEMMA,
            ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<pad>"),
            "<end_of_turn>",
            "<pad>",
            spoken=str.strip,
            has_system=False,
        ),
        TemplateFamily(
            "phi3",
            _PHI,
            ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
            "<|end|>",
            "<|endoftext|>",
        ),
    )
}


def make_family_tokenizer(family: TemplateFamily) -> Any:
    """A tokenizer with the family's control tokens and template."""
    tokenizer = make_merging_tokenizer()
    bos, eos, *others = family.control
    tokenizer.add_special_tokens(
        {"bos_token": bos, "eos_token": eos, "pad_token": family.pad, "additional_special_tokens": others}
    )
    tokenizer.chat_template = family.template
    return tokenizer


def make_merging_tokenizer() -> Any:
    """Byte-level; pairs of a few letters, of newlines and of spaces are one token, so that a cut elsewhere shows."""
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    newline, space = "Ċ", "Ġ"  # as byte-level vocabularies write them
    merges = [(a, b) for a in "abc" for b in "abc"] + [(newline, newline), (space, space), (space, "a"), (newline, "a")]
    vocab.update({a + b: len(vocab) + index for index, (a, b) in enumerate(merges)})
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)
