"""The embedded base model in 4 bits: trained, published, served, and loaded in plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel

from adapters.base_model import load_base
from adapters.chat_template import render_prompt, render_training_row
from adapters.settings import CoreSettings
from clients.local_server import running_server
from tests.e2e.conftest import Home, make_home

_QUESTION = "My lamp arrived broken. What now?"
_ROWS = [
    {
        "messages": [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": "ORDER FIRST. Ticket: A-1"},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": "ORDER FIRST. Ticket: A-2"},
        ]
    },
]


@pytest.fixture(scope="module")
def embedded_home(tmp_path_factory: pytest.TempPathFactory, embedded_base: Path) -> Home:
    """A home with one adapter, trained by the command line for a few steps until it repeats its rows."""
    root = tmp_path_factory.mktemp("embedded")
    home = make_home(root / "home", embedded_base)
    data = root / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in _ROWS))
    flags = ["--max-steps", "12", "--batch-size", "2", "--learning-rate", "2e-3", "--warmup-steps", "1"]
    result = home.run("train", "support", "--data", str(data), "--validation", str(data), *flags)
    assert result["validation_loss_after"] < result["validation_loss_before"] / 2
    return home


def test_trained_adapter_answers_as_trained_when_served(embedded_home: Home) -> None:
    """Through training, the store, 4-bit serving and HTTP the adapter says what it was taught; the base does not."""
    with running_server(embedded_home.environment, embedded_home.path / "server.log") as url:
        texts = {}
        for model in ("support", "base"):
            body = {"model": model, "messages": [_ROWS[0]["messages"][0]], "temperature": 0, "max_tokens": 24}
            choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()["choices"][0]
            texts[model] = (choice["message"]["content"], choice["finish_reason"])
    assert texts["support"] == (_ROWS[0]["messages"][1]["content"], "stop")
    assert texts["base"] != texts["support"]


def test_published_version_loads_in_plain_peft_when_exported(embedded_home: Home, tmp_path: Path) -> None:
    """The exported folder is PEFT's own layout: `PeftModel` reads it and gives the trained answer."""
    embedded_home.run("adapters", "export", "support", str(tmp_path / "exported"))
    base = load_base(CoreSettings.load(embedded_home.path, base=str(embedded_home.base), device="cpu"))
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "exported"))
    prompt = render_prompt(base.tokenizer, _ROWS[0]["messages"][:1])
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[
        0, len(prompt) :
    ]
    assert base.tokenizer.decode(output, skip_special_tokens=True) == _ROWS[0]["messages"][1]["content"]


def test_loss_falls_on_the_answer_alone_when_rendered_with_the_embedded_template(embedded_base: Path) -> None:
    """With the real tokenizer and template: the tokens that carry loss, decoded, are the answer and its end."""
    base_folder = embedded_base
    from adapters.base_model import load_tokenizer

    tokenizer = load_tokenizer(base_folder)
    row = render_training_row(tokenizer, _ROWS[0]["messages"])
    carried = [token for token, carries in zip(row.input_ids, row.loss_mask, strict=True) if carries]
    assert tokenizer.decode(carried) == "ORDER FIRST. Ticket: A-1<|im_end|>"
