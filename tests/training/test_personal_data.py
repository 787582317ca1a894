"""Likely personal data: counted by kind, with check digits where a kind has them."""

from __future__ import annotations

import pytest

from training.personal_data import count_personal_data

TEXTS = {
    "email": ("Write to ann.b+c@mail.example.com, or bob@x.de.", {"e-mail address": 2}),
    "no-email": ("Meet @ann at 5 @ the bar, a@b.", {}),
    "iban": ("DE89 3704 0044 0532 0130 00 and GB82WEST12345698765432", {"IBAN": 2}),
    "iban-with-a-wrong-digit": ("DE89 3704 0044 0532 0130 01", {}),
    "card": ("4111 1111 1111 1111 or 5500-0055-5555-5559", {"card number": 2}),
    "card-with-a-wrong-digit": ("4111 1111 1111 1112", {}),
    "zeros": ("0000 0000 0000 0000", {}),
    "ip": ("from 84.17.52.9", {"IP address": 1}),
    "private-ip": ("192.168.0.1, 127.0.0.1, 300.1.1.1", {}),
    "section": ("as in Section 12.1.4.2 of version 1.2.3", {}),
    "phones": ("+49 30 1234567, (030) 1234-5678, 0171 2345678, +1 (555) 123-4567", {"phone number": 4}),
    "dates-and-prices": ("2024-01-02 at 12:30:11, 1,200.50 for order 123456789", {}),
    "several": ("bob@x.de, +49 30 1234567", {"e-mail address": 1, "phone number": 1}),
}


@pytest.mark.parametrize(("text", "expected"), TEXTS.values(), ids=TEXTS)
def test_count_personal_data_counts_by_kind_when_a_text_holds_some(text: str, expected: dict[str, int]) -> None:
    """What has no right check digits, or the form of something else, is not counted."""
    assert expected == dict(count_personal_data(text))
