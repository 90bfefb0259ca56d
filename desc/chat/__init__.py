"""A conversation in the terminal: python -m desc.chat."""
