"""Where a long text can be cut so that GPT-2's pattern finds the same pieces as in the whole."""

import re
from collections.abc import Iterator

from lab.errors import UserError

# What the pattern's \s stands for in tiktoken: Unicode's White_Space. (Python's \s has U+001C to U+001F too.)
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
# A piece may begin with a space, but no piece goes on from anything else to whitespace, and none from a
# letter or a digit to anything else. For text without spaces: Latin letters and digits, and those of China,
# Japan and Korea, before ASCII or their own punctuation.
CUT = re.compile(
    rf"(?<=[^{WHITESPACE}])(?=[{WHITESPACE}])"
    r"|(?<=[A-Za-z\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    r"(?=[\x00-@\[-`{-\x7f\u3001\u3002\u300a-\u3011\uff01\uff0c\uff1a\uff1b\uff1f])"
    r"|(?<=[0-9])(?=[\x00-/:-\x7f])"
)
NEAR = 2**10  # characters in which a cut is looked for first: ordinary text has one there
LONGEST = 2**23  # characters without a cut that are taken: tiktoken needs up to 20 s and 2 GiB for them


class Unbroken(UserError):
    """Text that has no cut for too long, from its character `start` on."""

    def __init__(self, start: int):
        self.start = start
        super().__init__(
            f"from character {start:,} on, more than {LONGEST:,} characters have no space or other break: "
            f"too long for GPT-2's tokenizer\nbreak them up with spaces or newlines, or leave them out"
        )


def last(text: str, start: int, end: int) -> int | None:
    """The last cut between two places of the text, or None."""
    for first in (max(end - NEAR, start + 1), start + 1):
        cuts = [match.start() for match in CUT.finditer(text, first, end)]
        if cuts:
            return cuts[-1]
    return None


def parts(text: str, size: int) -> Iterator[str]:
    """The text in parts of at most `size` characters. A part is longer only if it has no cut inside.

    Unbroken if that is too long.
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
