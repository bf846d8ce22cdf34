"""Plumbing that a reader of the method may never open: command lines, rules, runs, processes, weights, data."""


class UserError(Exception):
    """Wrong input: `cli.cli` prints it as one line on standard error and exits with code 2."""
