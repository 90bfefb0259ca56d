"""desc: decoupled preference optimisation for emotional-support conversation, in plain PyTorch.

Data flows one way through the modules: esconv -> prompts -> encoding -> tree -> modeling -> losses.
"""

__version__ = "0.1.0"


class DescError(Exception):
    """Something that the user can mend; its one-line message says what to do. Scripts print it
    without a traceback."""
