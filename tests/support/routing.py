"""Prompts of three small domains and of none, so that a router trains in milliseconds."""

from __future__ import annotations

LEGAL = (
    "may my landlord keep the deposit",
    "the landlord wants to end my lease early",
    "is this contract clause about notice valid",
    "can a tenant sue the landlord over the lease",
    "my lease says the tenant pays all repairs",
    "does the contract bind me without a signature",
    "what does the court say about a broken contract",
    "how much notice does my lease ask of a tenant",
)
COOKING = (
    "how long do I bake bread in the oven",
    "a soup recipe with carrots and onions",
    "my cake sinks in the middle of the oven",
    "which flour makes the best bread dough",
    "can I freeze the soup with cream in it",
    "how hot must the oven be for a cake",
    "knead the bread dough by hand or not",
    "season the soup with salt before boiling",
)
MUSIC = (
    "tune my guitar strings to drop d",
    "which chords go with this guitar melody",
    "how do I practise scales on the piano",
    "the piano pedal makes the notes ring",
    "a fingering for fast guitar scales",
    "change the strings of a guitar at home",
    "learn to read notes for the piano",
    "what tempo fits this piano melody",
)
NOTHING = (
    "what is the capital of france",
    "tell me a joke",
    "hello there",
    "who was the first person on the moon",
    "how tall is a giraffe",
    "write a poem about rain",
    "what is seven times eight",
    "thanks a lot",
)
PROMPTS = {"cooking": COOKING, "legal": LEGAL, "music": MUSIC}

ABOUT_LEASE = "the landlord ends the lease of a tenant without notice"
ABOUT_BREAD = "bake the bread dough in a hot oven"
ABOUT_NOTHING = "zebra quantum volcano xylophone"
