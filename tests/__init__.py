"""Tests; they mirror the packages. `support` holds the tiny models and data that they share."""
