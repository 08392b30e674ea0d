"""Finds places where a long text can be split without changing how GPT-2's pattern splits it into pieces."""

import re
from collections.abc import Iterator

from lab.errors import UserError

# The pattern's \s in tiktoken matches Unicode's White_Space. (Python's \s also matches U+001C to U+001F.)
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# No piece continues from a non-whitespace character to whitespace, nor from a letter or digit to another kind
# of character. The last two alternatives are for text without spaces: Latin or CJK letters before ASCII or
# CJK punctuation, and digits before other ASCII characters.
CUT = re.compile(
    rf"(?<=[^{WHITESPACE}])(?=[{WHITESPACE}])"
    r"|(?<=[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    r"(?=[\x00-@\[-`{-\x7f\u3001\u3002\u300a-\u3011\uff01\uff0c\uff1a\uff1b\uff1f])"
    r"|(?<=[0-9])(?=[\x00-/:-\x7f])"
)
NEAR = 2**10  # characters to search first: ordinary text has a cut there
LONGEST = 2**23  # characters accepted without a cut: tiktoken needs up to 20 s and 2 GiB for them


class Unbroken(UserError):
    """The text has no cut for too many characters, beginning at character `start`."""

    def __init__(self, start: int):
        self.start = start
        super().__init__(
            f"from character {start:,} on, more than {LONGEST:,} characters have no space or other break: "
            f"too long for GPT-2's tokenizer\ninsert spaces or newlines, or remove that text"
        )


def last(text: str, start: int, end: int) -> int | None:
    """The last cut between positions `start` and `end`, or None."""
    for first in (max(end - NEAR, start + 1), start + 1):
        cuts = [match.start() for match in CUT.finditer(text, first, end)]
        if cuts:
            return cuts[-1]
    return None


def parts(text: str, size: int) -> Iterator[str]:
    """Splits the text into parts of at most `size` characters; a part is longer only if it has no cut.

    Raises Unbroken if a part is longer than LONGEST.
    """
    start = 0
    while len(text) - start > size:
        end = last(text, start, start + size)
        if not end:
            found = CUT.search(text, start + size, start + LONGEST + 1)
            end = found.start() if found else len(text)
            if end - start > LONGEST:
                raise Unbroken(start)
            if not found:
                break
        yield text[start:end]
        start = end
    yield text[start:]
