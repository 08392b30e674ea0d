"""Prints text in lines that are not too long."""

import textwrap

WIDTH = 100


def say(text: str, indent: str = "") -> None:
    """Prints text in lines of up to WIDTH columns; a shorter line stays as it is."""
    for line in text.split("\n"):
        short = len(indent + line) <= WIDTH
        print(indent + line if short else textwrap.fill(indent + line, WIDTH, subsequent_indent=indent))
