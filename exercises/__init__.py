"""Exercises that check themselves: README.md has the list, `pytest exercises -k ex04` checks the fourth."""
