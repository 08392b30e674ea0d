"""Which blocks of the cache belong to whom: reference counts, shared prefixes, and what is evicted first.

A block holds the keys and values of block_size neighbouring tokens; the pool (pool.py) stores them, this file
only counts. A request's table lists its blocks, as an operating system's page table lists a process's pages
(arXiv 2309.06180, section 4). Keys and values of a token depend on all tokens before it, so a full block is
identified by the hash of its tokens and of the block before it. Requests that begin alike share these blocks.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

NULL = 0  # fills up short tables in a batch; it is never taken, and stays zero


@dataclass
class Table:
    """The blocks of one sequence, and how many of its tokens they hold."""

    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Those of the full blocks."""
    length: int = 0


class Blocks:
    """Counts the references of n_blocks blocks. A block without references is free.

    A free block keeps its content, and its hash, until another sequence takes it.
    """

    def __init__(self, n_blocks: int, block_size: int, copy: Callable[[int, int], None], share_prefixes=True):
        self.block_size = block_size
        self.share_prefixes = share_prefixes
        self.copy = copy  # copies the content of one block into another
        self.references = [0] * n_blocks
        self.hashes: list[bytes | None] = [None] * n_blocks
        self.by_hash: dict[bytes, int] = {}  # where the content is
        self.free = OrderedDict.fromkeys(range(1, n_blocks))  # the next one to take first; block 0 is NULL

    def count(self, n_tokens: int) -> int:
        """How many blocks hold n_tokens."""
        return -(-n_tokens // self.block_size)

    # --- Sharing ---

    def match(self, tokens: list[int]) -> Table:
        """A table of the blocks that already hold the start of these tokens. It has no references yet.

        It leaves at least one token to compute: without it there would be no logits to sample from.
        """
        found = Table()
        if self.share_prefixes:
            for i in range((len(tokens) - 1) // self.block_size):
                digest = self.next_hash(found, tokens[i * self.block_size : (i + 1) * self.block_size])
                if digest not in self.by_hash:
                    break
                found.blocks.append(self.by_hash[digest])
                found.hashes.append(digest)
        found.length = len(found.blocks) * self.block_size
        return found

    def fork(self, table: Table) -> Table:
        """A second table of the same blocks. The first write to a shared block copies it."""
        for block in table.blocks:
            if self.references[block] == 0:
                del self.free[block]
            self.references[block] += 1
        return Table(list(table.blocks), list(table.hashes), table.length)

    def next_hash(self, table: Table, tokens: list[int]) -> bytes:
        """The hash of a full block that follows the full blocks of a table."""
        parent = table.hashes[-1] if table.hashes else b""
        return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()

    # --- Taking and releasing ---

    def needed(self, table: Table, length: int) -> int:
        """How many free blocks `grow` would take."""
        return self.count(length) - len(table.blocks) + len(self.shared_writes(table, length))

    def needed_for(self, found: Table, length: int) -> int:
        """How many of the free blocks a match would use up if it were forked and then grown."""
        reused = sum(self.references[block] == 0 for block in found.blocks)
        return self.count(length) - len(found.blocks) + reused

    def grow(self, table: Table, length: int) -> None:
        """Makes room for the tokens from table.length up to length, which nobody else may see."""
        for i in self.shared_writes(table, length):
            shared = table.blocks[i]
            table.blocks[i] = self.take()
            self.copy(shared, table.blocks[i])
            self.references[shared] -= 1  # there are others, so it does not become free
        while len(table.blocks) < self.count(length):
            table.blocks.append(self.take())

    def shared_writes(self, table: Table, length: int) -> list[int]:
        """Where in the table blocks are that others hold too, and that would be written to."""
        first = table.length // self.block_size
        last = min(self.count(length), len(table.blocks))
        return [i for i in range(first, last) if self.references[table.blocks[i]] > 1]

    def take(self) -> int:
        block, _ = self.free.popitem(last=False)
        self.forget(block)  # its content is about to change
        self.references[block] = 1
        return block

    def forget(self, block: int) -> None:
        """Takes a block out of the prefix cache."""
        digest, self.hashes[block] = self.hashes[block], None
        if digest is not None:
            del self.by_hash[digest]

    def computed(self, table: Table, tokens: list[int], length: int) -> None:
        """Notes that the model has computed tokens up to length: blocks that became full can be shared."""
        table.length = length
        size = self.block_size
        for i in range(len(table.hashes), length // size if self.share_prefixes else 0):
            digest, block = self.next_hash(table, tokens[i * size : (i + 1) * size]), table.blocks[i]
            table.hashes.append(digest)
            if digest not in self.by_hash:  # else two computed the same at the same time: the first stays
                self.by_hash[digest], self.hashes[block] = block, digest

    def release(self, table: Table) -> None:
        """Gives up all blocks of the table. Prefixes are evicted last: they are the most useful."""
        for block in reversed(table.blocks):
            self.give_back(block)
        table.blocks, table.hashes, table.length = [], [], 0

    def trim(self, table: Table) -> None:
        """Gives up the blocks behind the last token: room for drafts that were not accepted."""
        while len(table.blocks) > self.count(table.length):
            self.give_back(table.blocks.pop())

    def give_back(self, block: int) -> None:
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free[block] = None
            if self.hashes[block] is None:  # nothing to reuse, so it is the next to take
                self.free.move_to_end(block, last=False)


class Swap:
    """Room for the blocks of preempted sequences in other memory, so that they need not be computed again."""

    def __init__(self, n_places: int, save: Callable[[int, int], None], load: Callable[[int, int], None]):
        self.free = list(range(n_places))
        self.save, self.load = save, load  # save(block, place) and load(place, block) copy the content

    def put(self, table: Table) -> "Saved | None":
        """Saves the blocks of a table. None if there is no room."""
        if len(self.free) < len(table.blocks) or not table.length:
            return None
        places = [self.free.pop() for _ in table.blocks]
        for block, place in zip(table.blocks, places, strict=True):
            self.save(block, place)
        return Saved(places, table.length)

    def get(self, saved: "Saved", table: Table, first: int) -> None:
        """Loads the blocks from index `first` on into those of a table, and frees all their places."""
        for block, place in list(zip(table.blocks, saved.places, strict=False))[first:]:
            self.load(place, block)
        self.drop(saved)

    def drop(self, saved: "Saved") -> None:
        self.free += saved.places


@dataclass
class Saved:
    """Where a table's blocks are in the meantime, and how many tokens they hold."""

    places: list[int]
    length: int
