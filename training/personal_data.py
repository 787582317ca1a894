"""Counts what looks like personal data in texts. Says how much of which kind there is, never what it is."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter

__all__ = ["count_personal_data"]

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63})+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])")
_IP = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
# With a country code, or in the groups in which numbers are dialled in a country: other digits could be any number.
_PHONE = re.compile(
    r"(?<![\w+.-])(?<!\d )"
    r"(?:\+\d{1,3}[ ./-]?(?:\(?\d{1,5}\)?[ ./-]?){2,5}\d"
    r"|\(?0\d{2,5}\)?[ /-](?:\d{2,4}[ -]\d{2,8}|\d{6,8})"
    r"|\(?\d{3}\)?[ -]\d{3}-\d{4})"
    r"(?!\w|[ -]\d)"
)
_MIN_PHONE_DIGITS = 8
_MIN_IP_PART = 50


def count_personal_data(text: str) -> Counter[str]:
    """How often each kind of likely personal data occurs in a text.

    IBANs and card numbers count only with right check digits. IP addresses count only if they are public ones and one
    of their parts is 50 or more: the numbers of sections in contracts look like the others.
    """
    found: Counter[str] = Counter()
    if "@" in text:
        found["e-mail address"] = len(_EMAIL.findall(text))
    if any(letter.isdigit() for letter in text):
        ibans = [match for match in _IBAN.findall(text) if _is_iban(match)]
        text = _without(text, ibans)
        cards = [match for match in _CARD.findall(text) if _is_card(match)]
        text = _without(text, cards)
        found["IBAN"], found["card number"] = len(ibans), len(cards)
        found["IP address"] = sum(_is_public_ip(match) for match in _IP.findall(text))
        found["phone number"] = sum(
            sum(letter.isdigit() for letter in match) >= _MIN_PHONE_DIGITS for match in _PHONE.findall(text)
        )
    return +found


def _without(text: str, found: list[str]) -> str:
    for match in found:
        text = text.replace(match, "#")
    return text


def _is_iban(text: str) -> bool:
    """ISO 7064 MOD 97-10: with the first four letters at the end and A as 10, the remainder by 97 is 1."""
    letters = text.replace(" ", "")
    return 15 <= len(letters) <= 34 and int("".join(str(int(c, 36)) for c in letters[4:] + letters[:4])) % 97 == 1


def _is_card(text: str) -> bool:
    """Luhn's check digit; a row of equal digits passes it and is none."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _is_public_ip(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global and max(map(int, text.split("."))) >= _MIN_IP_PART
    except ValueError:
        return False
