"""The exercises on serving: who holds a block of the cache, which prefixes are shared, and who copies."""

from exercises.units import Chapter, Exercise, Mistake, Question, Rewrite

# ---- 9.1 taking and giving back


def new_blocks(m, n_blocks: int, block_size: int, share_prefixes: bool = True):
    """Blocks without memory behind them."""
    return m.Blocks(n_blocks, block_size, lambda source, target: None, share_prefixes)


def give_hash(blocks, block: int) -> None:
    """Makes a block one whose content can be found again."""
    digest = b"content of %d" % block
    blocks.hashes[block], blocks.by_hash[digest] = digest, block


def one_by_one(m):
    """Blocks with one, two and three references, with and without a hash."""
    blocks, found = new_blocks(m, 8, 2), {}
    found["the first five blocks taken"] = [blocks.take() for _ in range(5)]
    found["references then"] = list(blocks.references)
    blocks.references[2], blocks.references[3] = 2, 3
    for block in (1, 4, 2):
        give_hash(blocks, block)
    for block in (2, 3, 5, 1, 4):
        blocks.give_back(block)
    found["references after one of each was given back"] = list(blocks.references)
    found["free blocks then, the next to take first"] = list(blocks.free)
    found["blocks with a hash then"] = sorted(blocks.by_hash.values())
    found["the next blocks taken"] = [blocks.take() for _ in range(min(4, len(blocks.free)))]
    found["blocks with a hash at the end"] = sorted(blocks.by_hash.values())
    found["references at the end"] = list(blocks.references)
    return found


def whole_tables(m):
    """A table whose first block another one holds, too."""
    blocks, found = new_blocks(m, 9, 2), {}
    taken = [blocks.take() for _ in range(4)]
    for block in taken:
        give_hash(blocks, block)
    blocks.references[taken[0]] += 1
    table = m.Table(list(taken), [blocks.hashes[block] for block in taken], 8)
    blocks.release(table)
    found["references after a table is released"] = list(blocks.references)
    found["free blocks after it, the next to take first"] = list(blocks.free)
    found["the released table has blocks"] = list(table.blocks)
    found["the released table has hashes"] = len(table.hashes)
    found["the released table has tokens"] = table.length
    return found


def free_means_unreferenced(m):
    blocks = new_blocks(m, 6, 2)
    held = [blocks.take() for _ in range(4)]
    for block in held[::2]:
        blocks.give_back(block)
    return set(blocks.free) == {block for block in range(1, 6) if not blocks.references[block]}


def taken_without_hash(m):
    blocks = new_blocks(m, 2, 2)
    give_hash(blocks, 1)
    return blocks.take() == 1 and blocks.hashes[1] is None and not blocks.by_hash


def useful_content_waits(m):
    blocks = new_blocks(m, 4, 2)
    held = [blocks.take() for _ in range(3)]
    give_hash(blocks, held[0])
    for block in held:
        blocks.give_back(block)
    return held[0] == list(blocks.free)[-1]


def beginning_is_kept(m):
    blocks = new_blocks(m, 4, 2)
    table = m.Table([blocks.take() for _ in range(3)])
    order = list(table.blocks)
    for block in order:
        give_hash(blocks, block)
    blocks.release(table)
    return list(blocks.free) == order[::-1] and table == m.Table()


POPPED = "block, _ = self.free.popitem(last=False)"
FREED = "self.free[block] = None"
UNHASHED = "if self.hashes[block] is None:"
EMPTIED = "table.blocks, table.hashes, table.length = [], [], 0"

COUNTING = Exercise(
    number="9.1",
    title="Blocks are taken and given back",
    minutes=25,
    functions=("Blocks.take", "Blocks.give_back", "Blocks.release"),
    question="Three texts begin alike and hold the same block. One of them is complete. Is the block free? "
    "And when it is, should its content be thrown away?",
    shapes="references: how many tables hold a block, by its number. free: an OrderedDict whose first key "
    "is the next block to take. hashes: a block's hash, or None. A free block with a hash goes to the end "
    "of free, one without to its front. take returns a block with one reference and no hash.",
    steps="1. take: the first of the free blocks. Its content is about to change, so forget takes it out of "
    "the prefix cache. It has one reference.\n"
    "2. give_back: one reference less. At zero the block is free: last in the order, or first if it has no "
    "hash.\n"
    "3. release: give back all blocks of the table, the last one first, and empty the table.",
    afterwards="Free does not mean empty: until somebody takes the block, another request can still find its "
    "content.",
    probes=(one_by_one, whole_tables),
    properties={
        "exactly the blocks without references are free": free_means_unreferenced,
        "a block that is taken has no hash": taken_without_hash,
        "of free blocks, one whose content can be found is taken last": useful_content_waits,
        "a released table is empty, and its first block is the last to be taken": beginning_is_kept,
    },
    mistakes=(
        Mistake(
            "free at one",
            (("if self.references[block] == 0:", "if self.references[block] <= 1:"),),
            "A block is free although one reference is left.",
            "somebody takes it and writes over the keys and values of a text that still runs.",
            "the count at which a block becomes free, and whether it is lowered before or after that "
            "question.",
        ),
        Mistake(
            "free at once",
            (("if self.references[block] == 0:", "if True:"),),
            "A block is free as soon as anybody gives it back.",
            "the others that hold it go on reading it, while somebody new writes to it.",
            "the condition for a block to become free.",
        ),
        Mistake(
            "not counted down",
            (("self.references[block] -= 1", "pass"),),
            "Giving a block back does not lower its count.",
            "no block ever becomes free, and the pool runs empty.",
            "the count of the block that is given back.",
        ),
        Mistake(
            "set to zero",
            (("self.references[block] -= 1", "self.references[block] = 0"),),
            "Giving a block back takes all of its references away.",
            "only one of those who share it is gone.",
            "what happens to the count.",
        ),
        Mistake(
            "never free",
            (("if self.references[block] == 0:", "if False:"),),
            "The count reaches zero, and the block is not among the free ones.",
            "the pool runs empty though nobody holds anything.",
            "what else happens at zero.",
        ),
        Mistake(
            "unhashed last",
            ((UNHASHED, "if False:"),),
            "A block without a hash is put at the end of the free ones.",
            "nobody can find its content, so it should be taken before those that may be useful again.",
            "the place of a block without a hash.",
        ),
        Mistake(
            "all in front",
            ((UNHASHED, "if True:"),),
            "Every block that becomes free is the next to be taken, with a hash or without.",
            "what was used last is the most likely to be used again, and would be lost first.",
            "the place of a block with a hash.",
        ),
        Mistake(
            "hashed in front",
            ((UNHASHED, "if self.hashes[block] is not None:"),),
            "Blocks with a hash are taken first, and those without one last.",
            "it is the other way round: what can be found again should stay as long as possible.",
            "the condition for the front.",
        ),
        Mistake(
            "forgotten when free",
            ((FREED, f"{FREED}\n            self.forget(block)"),),
            "A block loses its hash as soon as it is free.",
            "its content stays until somebody takes it. Requests that come one after the other could no "
            "longer share a prefix.",
            "the moment at which a hash is forgotten.",
        ),
        Mistake(
            "newest first",
            ((POPPED, "block, _ = self.free.popitem()"),),
            "The last of the free blocks is taken, not the first.",
            "that is the one freed most recently, whose content is the most likely to be needed again.",
            "the end of the order from which a block is taken.",
        ),
        Mistake(
            "old hash kept",
            (("self.forget(block)", "pass"),),
            "A block that is taken keeps its old hash.",
            "a request with the old text would find this block, and read another text's keys and values.",
            "what must be undone before a block's content changes.",
        ),
        Mistake(
            "no reference",
            (("self.references[block] = 1", "pass"),),
            "A block that is taken has no reference.",
            "given back, its count becomes -1; shared, it looks as if one holder were missing.",
            "the count of the block that is taken.",
        ),
        Mistake(
            "block 0 taken",
            ((POPPED, "block = self.references.index(0)\n        self.free.pop(block, None)"),),
            "The block with the lowest number and no references is taken, and the first of these is block 0.",
            "block 0 fills up short tables in a batch and must stay zero. The lowest number is not the "
            "order of eviction, either.",
            "the way in which a free block is found.",
        ),
        Mistake(
            "beginning first",
            (("in reversed(table.blocks)", "in table.blocks"),),
            "A table gives back its first block first.",
            "the beginning of a text is then evicted before its end. Without the beginning the rest cannot "
            "be found, and other texts are more likely to share the beginning.",
            "the order in which a table's blocks are given back.",
        ),
        Mistake(
            "table kept",
            ((EMPTIED, "pass"),),
            "The released table still lists its blocks.",
            "released again, or read again, it would touch blocks that belong to others.",
            "the table after its blocks are given back.",
        ),
        Mistake(
            "hashes kept",
            ((EMPTIED, "table.blocks = []"),),
            "The released table has no blocks, but still hashes and a length.",
            "a preempted request starts again with this table. Its first new block would continue the old "
            "chain of hashes.",
            "the three fields of a table.",
        ),
    ),
    rewrites=(
        Rewrite(
            "next of iter, and move_to_end",
            """
class Blocks:
    def take(self):
        block = next(iter(self.free))
        del self.free[block]
        self.forget(block)
        self.references[block] += 1
        return block

    def give_back(self, block):
        left = self.references[block] - 1
        self.references[block] = left
        if left:
            return
        self.free[block] = None
        self.free.move_to_end(block, last=self.hashes[block] is not None)

    def release(self, table):
        while table.blocks:
            self.give_back(table.blocks.pop())
        table.hashes.clear()
        table.length = 0
""",
        ),
        Rewrite(
            "a reversed range",
            (("in reversed(table.blocks)", "in table.blocks[::-1]"), (EMPTIED, "table.__init__()")),
        ),
        Rewrite(
            "popped from the wrong end of a list",
            """
class Blocks:
    def take(self):
        block = list(self.free).pop()
        del self.free[block]
        self.forget(block)
        self.references[block] = 1
        return block
""",
            mistake="newest first",
        ),
        Rewrite(
            "asked before counting",
            """
class Blocks:
    def give_back(self, block):
        if self.references[block] <= 2:
            self.free[block] = None
            if self.hashes[block] is None:
                self.free.move_to_end(block, last=False)
        self.references[block] -= 1
""",
            mistake="free at one",
        ),
    ),
)

# ---- 9.2 shared prefixes

TEXTS = ([1, 2, 3, 4, 5, 6, 7], [3, 4, 7], [1, 2, 8, 8, 0], [1, 23, 5, 5])
"""All are computed, in blocks of 2 tokens."""
PROMPTS = {
    "that goes on after a text": [1, 2, 3, 4, 9, 9, 9],
    "with the last token of a block changed": [1, 2, 3, 9, 5, 6, 7],
    "that is two full blocks of a text": [1, 2, 3, 4],
    "of one full block": [1, 2],
    "of a block and a token": [1, 2, 3],
    "that begins in the middle of a text": [5, 6, 7],
    "with a second block that is the first of a text": [9, 9, 3, 4, 5],
    "with the third block of a text after another second": [1, 2, 8, 8, 5, 6, 7],
    "with two tokens exchanged": [2, 1, 9],
    "with a token that is larger by 256": [257, 2, 9],
    "with the same digits in other tokens": [12, 3, 9],
}


def add_text(blocks, tokens: list[int], length: int | None = None):
    """Computes a text from its first token that is not in the cache, up to a length; returns its table."""
    table = blocks.fork(blocks.match(tokens))
    blocks.grow(table, len(tokens))
    blocks.computed(table, tokens, len(tokens) if length is None else length)
    return table


def matches(m):
    """What is found of prompts that have something in common with the texts."""
    blocks, found = new_blocks(m, 30, 2), {}
    for tokens in TEXTS:
        add_text(blocks, tokens)
    references = list(blocks.references)
    for name, prompt in PROMPTS.items():
        table = blocks.match(prompt)
        found[f"blocks found for a prompt {name}"] = list(table.blocks)
        found[f"tokens found for a prompt {name}"] = table.length
        found[f"number of hashes found for a prompt {name}"] = len(table.hashes)
    found["match changes references"] = blocks.references != references
    return found


def noted(m):
    """Texts computed in two steps, twice at the same time, and without sharing."""
    blocks, found = new_blocks(m, 30, 2), {}
    tokens = [1, 2, 3, 4, 5, 6, 7]
    table = add_text(blocks, tokens, 3)
    found["tokens computed, of which 3 are"] = table.length
    found["blocks found after 3 tokens"] = list(blocks.match(tokens).blocks)
    blocks.computed(table, tokens, 7)
    found["tokens computed at the end"] = table.length
    found["blocks found after all tokens"] = list(blocks.match(tokens).blocks)
    found["number of the table's hashes"] = len(table.hashes)
    found["blocks with a hash"] = [block for block, digest in enumerate(blocks.hashes) if digest is not None]

    twice = [m.Table(), m.Table()]
    for table in twice:
        blocks.grow(table, 5)
    for table in twice:
        blocks.computed(table, [9, 8, 7, 6, 5], 5)
    found["blocks found of a text computed twice at the same time"] = list(
        blocks.match([9, 8, 7, 6, 5]).blocks
    )
    found["blocks with a hash after it"] = [b for b, digest in enumerate(blocks.hashes) if digest is not None]
    found["number of hashes of the second"] = len(twice[1].hashes)

    alone = new_blocks(m, 30, 2, share_prefixes=False)
    add_text(alone, tokens)
    found["blocks found without sharing"] = list(alone.match(tokens).blocks)
    found["hashes known without sharing"] = len(alone.by_hash)
    return found


def only_true_prefixes(m):
    """Of two-block texts over two tokens, only those that begin alike are found."""
    for number in range(16):
        blocks = new_blocks(m, 9, 2)
        add_text(blocks, [0, 1, 1, 0, 0])
        add_text(blocks, [1, 0, 0])
        prompt = [int(bit) for bit in f"{number:04b}"] + [0]
        alike = 4 if prompt[:4] == [0, 1, 1, 0] else 2 if prompt[:2] in ([0, 1], [1, 0]) else 0
        if blocks.match(prompt).length != alike:
            return False
    return True


def one_is_left(m):
    blocks = new_blocks(m, 9, 2)
    add_text(blocks, [0, 1, 1, 0, 0])
    return all(blocks.match([0, 1, 1, 0][:n]).length < n for n in range(1, 5))


def only_computed(m):
    tokens = [0, 1, 1, 0, 0]
    for n in range(1, 6):
        blocks = new_blocks(m, 9, 2)
        add_text(blocks, tokens, n)
        if blocks.match(tokens).length > n:
            return False
    return True


def first_stays(m):
    blocks, tables = new_blocks(m, 9, 2), [m.Table(), m.Table()]
    for table in tables:
        blocks.grow(table, 3)
        blocks.computed(table, [0, 1, 1], 3)
    return blocks.match([0, 1, 1]).blocks == tables[0].blocks[:1]


DIGEST = 'return blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()'
LOOKED_UP = "found.blocks.append(self.by_hash[digest])"
FULL = "range(len(table.hashes), length // size if self.share_prefixes else 0)"

PREFIXES = Exercise(
    number="9.2",
    title="A chain of hashes finds shared prefixes",
    minutes=35,
    functions=("Blocks.match", "Blocks.next_hash", "Blocks.computed"),
    question="Two texts have the same tokens 17 to 32. May they share the block that holds the keys and "
    "values of these tokens?",
    shapes="next_hash(table, tokens): bytes that depend on the block's tokens and on the last of the table's "
    "hashes, if it has any. by_hash: the block by hash. match(tokens): a Table with blocks, their hashes, "
    "and length = blocks · block_size < len(tokens). computed(table, tokens, length): enters each block "
    "that is now full.",
    steps="1. next_hash: hash the parent's hash and the tokens together.\n"
    "2. match: go block by block through the prompt, but leave at least one token. Stop at the first hash "
    "that is not known; else add block and hash to the table. Take no references.\n"
    "3. computed: set the table's length. For each full block that has no hash in the table yet: add its "
    "hash to the table. If the hash is not known, enter the block in by_hash, and the hash in hashes.\n"
    "4. Without share_prefixes, nothing is found and nothing is entered.",
    afterwards="The hash stands for everything up to the end of its block. This holds because keys and "
    "values of a token depend on all tokens before it.",
    probes=(matches, noted),
    properties={
        "what begins alike is found, and nothing else": only_true_prefixes,
        "at least one token is left to compute": one_is_left,
        "nothing is found before it is computed": only_computed,
        "of two texts computed at the same time, the first is found": first_stays,
    },
    mistakes=(
        Mistake(
            "no parent",
            (("blake2b(parent + array", "blake2b(array"),),
            "The hash depends on the block's own tokens alone.",
            "keys and values depend on all tokens before. A block from the middle of one text would be read "
            "at the start of another.",
            "what goes into the hash.",
        ),
        Mistake(
            "first block as parent",
            (("table.hashes[-1]", "table.hashes[0]"),),
            "The parent of every block is the text's first block.",
            "a third block is then found behind any second block, though its keys and values depend on it.",
            "the entry of the table's hashes that goes into the next one.",
        ),
        Mistake(
            "order lost",
            (('array("q", tokens)', 'array("q", sorted(tokens))'),),
            "Two blocks with the same tokens in another order have the same hash.",
            "another order is another text.",
            "what is done with the tokens before they are hashed: sorting, a set or a sum loses their order.",
        ),
        Mistake(
            "one byte",
            (('array("q", tokens).tobytes()', "bytes(token % 256 for token in tokens)"),),
            "Tokens that differ by 256 have the same hash.",
            "vocabularies are far larger than 256, so a token needs more than one byte.",
            "how tokens become bytes.",
        ),
        Mistake(
            "digits run together",
            (('array("q", tokens).tobytes()', '"".join(map(str, tokens)).encode()'),),
            "Tokens 1 and 23 have the same hash as 12 and 3.",
            "without a separator or a fixed width, the end of one token is lost in the next.",
            "how tokens become bytes.",
        ),
        Mistake(
            "whole prompt",
            (("range((len(tokens) - 1) //", "range(len(tokens) //"),),
            "A prompt of full blocks is found as a whole, and no token is left to compute.",
            "the logits after its last token are needed to sample the next one, and the cache has no logits.",
            "the number of blocks that are looked up.",
        ),
        Mistake(
            "goes on after a gap",
            (("                    break", "                    continue"),),
            "After a block that is not known, later ones are still looked up.",
            "a prefix has no gaps. The blocks found would stand at the wrong places of the table.",
            "what happens at the first hash that is not known.",
        ),
        Mistake(
            "references in match",
            ((LOOKED_UP, f"{LOOKED_UP}\n                self.references[self.by_hash[digest]] += 1"),),
            "A match counts references.",
            "the scheduler may look and then let the request wait; the blocks would never become free. fork "
            "counts them.",
            "what else match changes.",
        ),
        Mistake(
            "hashes not returned",
            (("found.hashes.append(digest)", "pass"),),
            "The table that match returns has no hashes.",
            "the next block's hash then lacks its parent, so only first blocks are found.",
            "what is added to the table for each block found.",
        ),
        Mistake(
            "length in blocks",
            (("found.length = len(found.blocks) * self.block_size", "found.length = len(found.blocks)"),),
            "The length of a match counts blocks, not tokens.",
            "tokens that are in the cache would be computed again, and written over shared blocks.",
            "the length of the table that match returns.",
        ),
        Mistake(
            "unfinished blocks",
            (("length // size if", "self.count(length) if"),),
            "A block is entered before its last token is computed.",
            "another request would read keys and values that are not there yet.",
            "which blocks count as full: the division is rounded down.",
        ),
        Mistake(
            "before it is computed",
            (("length // size if", "len(tokens) // size if"),),
            "All full blocks of the text are entered, also those that are not computed yet.",
            "a long prompt is computed in several steps. Others would read blocks that are still empty.",
            "the length up to which blocks are entered.",
        ),
        Mistake(
            "length not noted",
            (("table.length = length", "pass"),),
            "The table's length does not change.",
            "the same tokens would be computed again in every step.",
            "what computed tells the table.",
        ),
        Mistake(
            "chain begun anew",
            (("range(len(table.hashes), length", "range(0, length"),),
            "Blocks that have a hash already get another one.",
            "it continues the chain behind the blocks' own hashes, so it stands for a text that does not "
            "exist.",
            "the first block that computed looks at.",
        ),
        Mistake(
            "table's hashes forgotten",
            (("table.hashes.append(digest)", "pass"),),
            "computed does not add the hashes to the table.",
            "the next block has no parent, so its hash stands for a text that begins with it.",
            "what is noted for each full block, besides by_hash.",
        ),
        Mistake(
            "last one stays",
            (("if digest not in self.by_hash:  #", "if True:  #"),),
            "If two texts compute the same block at the same time, the second replaces the first.",
            "then two blocks have the same hash. When the first is taken, its hash is deleted, and the "
            "second can no longer be found, or deleted.",
            "what happens if a hash is known already.",
        ),
        Mistake(
            "block without its hash",
            (("self.by_hash[digest], self.hashes[block] = block, digest", "self.by_hash[digest] = block"),),
            "A block that was entered does not know its own hash.",
            "when it is taken for another text, the hash cannot be deleted, and finds the wrong content.",
            "the two places where block and hash are entered.",
        ),
        Mistake(
            "entered without sharing",
            (("length // size if self.share_prefixes else 0", "length // size"),),
            "Hashes are entered although prefixes are not shared.",
            "blocks then look useful and are kept for nothing, and hashing costs time.",
            "share_prefixes in computed.",
        ),
    ),
    rewrites=(
        Rewrite(
            "sha256 of text",
            """
import hashlib

class Blocks:
    def next_hash(self, table, tokens):
        parent = table.hashes[-1].hex() if table.hashes else "start"
        return hashlib.sha256(f"{parent}:{','.join(map(str, tokens))}".encode()).digest()
""",
        ),
        Rewrite(
            "whole prefixes instead of hashes",
            """
class Blocks:
    def next_hash(self, table, tokens):
        return (table.hashes[-1] if table.hashes else ()) + tuple(tokens)

    def match(self, tokens):
        blocks, hashes, size = [], [], self.block_size
        while self.share_prefixes and (len(blocks) + 1) * size < len(tokens):
            digest = tuple(tokens[: (len(blocks) + 1) * size])
            block = self.by_hash.get(digest)
            if block is None:
                break
            blocks += [block]
            hashes += [digest]
        return Table(blocks, hashes, len(blocks) * size)
""",
        ),
        Rewrite(
            "computed with a while loop",
            """
class Blocks:
    def computed(self, table, tokens, length):
        table.length = length
        if not self.share_prefixes:
            return
        while (len(table.hashes) + 1) * self.block_size <= length:
            start = len(table.hashes) * self.block_size
            digest = self.next_hash(table, tokens[start : start + self.block_size])
            block = table.blocks[len(table.hashes)]
            table.hashes.append(digest)
            if self.by_hash.setdefault(digest, block) == block:
                self.hashes[block] = digest
""",
        ),
        Rewrite(
            "a hash of the tokens alone, by Python",
            """
class Blocks:
    def next_hash(self, table, tokens):
        return hash(tuple(tokens)).to_bytes(8, "big", signed=True)
""",
            mistake="no parent",
        ),
        Rewrite(
            "a loop over all full blocks",
            """
class Blocks:
    def match(self, tokens):
        found, size = Table(), self.block_size
        if not self.share_prefixes:
            return found
        for start in range(0, len(tokens) - size + 1, size):
            digest = self.next_hash(found, tokens[start : start + size])
            if digest not in self.by_hash:
                return found
            found.blocks.append(self.by_hash[digest])
            found.hashes.append(digest)
            found.length += size
        return found
""",
            mistake="whole prompt",
        ),
    ),
)

# ---- 9.3 copy on write


class Pool:
    """The tokens that blocks of 4 hold, and which blocks were copied."""

    def __init__(self, m, n_blocks: int = 30):
        self.content, self.copies = [[] for _ in range(n_blocks)], []
        self.blocks = m.Blocks(n_blocks, 4, self.copy)

    def copy(self, source: int, target: int) -> None:
        self.content[target] = list(self.content[source])
        self.copies.append((source, target))

    def write(self, table, text: str) -> None:
        """Makes room for letters, and writes them behind the table's tokens."""
        self.blocks.grow(table, table.length + len(text))
        for letter in text:
            if table.length // 4 < len(table.blocks):  # else the letter is lost
                self.content[table.blocks[table.length // 4]][table.length % 4 :] = [letter]
            table.length += 1

    def read(self, table) -> str:
        return "".join("".join(self.content[block]) for block in table.blocks)[: table.length]


def state(pool: Pool, **tables) -> dict:
    """All that can be seen after a step."""
    found = {"copied (from, to)": list(pool.copies), "references": pool.blocks.references[:12]}
    for name, table in tables.items():
        found |= {f"blocks of {name}": list(table.blocks), f"text of {name}": pool.read(table)}
    return found


def forks(m):
    """Three texts share a full block and half of another; each goes on with its own letters."""
    pool, found = Pool(m), {}
    first = m.Table()
    pool.write(first, "abcdef")
    first.hashes.append(b"abcd")
    second, third = pool.blocks.fork(first), pool.blocks.fork(first)
    tables = {"the first": first, "the second": second, "the third": third}
    found |= {f"after two forks: {name}": value for name, value in state(pool, **tables).items()}
    found["after two forks: number of hashes of the second"] = len(second.hashes)
    second.hashes.append(b"efXY")
    found["number of hashes of the first, after the second got one"] = len(first.hashes)
    pool.write(second, "XY")
    found |= {f"after the second wrote: {name}": value for name, value in state(pool, **tables).items()}
    pool.write(third, "123")
    found |= {f"after the third wrote: {name}": value for name, value in state(pool, **tables).items()}
    pool.write(first, "g")
    found |= {f"after the first wrote: {name}": value for name, value in state(pool, **tables).items()}
    return found


def borders(m):
    """A fork at the end of a block, room for drafts that were not accepted, and blocks found while free."""
    pool, found = Pool(m), {}
    full = m.Table()
    pool.write(full, "abcd")
    other = pool.blocks.fork(full)
    pool.write(other, "efgh")
    of = {"the text": full, "its fork": other}
    found |= {f"forked at the end of a block: {name}": value for name, value in state(pool, **of).items()}

    pool = Pool(m)
    drafted = m.Table()
    pool.write(drafted, "abcdefghi")
    drafted.length = 2  # the other letters were drafts
    other = pool.blocks.fork(drafted)
    pool.write(other, "X")
    of = {"the text": drafted, "its fork": other}
    found |= {f"with room for drafts: {name}": value for name, value in state(pool, **of).items()}
    pool.write(other, "YZUVW")
    found |= {f"after more was written: {name}": value for name, value in state(pool, **of).items()}

    pool = Pool(m)
    before = m.Table()
    pool.write(before, "abcdefgh")
    blocks = list(before.blocks)
    pool.blocks.release(before)
    again = pool.blocks.fork(m.Table(blocks, [], 8))
    found["free blocks among those that a text holds again"] = [b for b in blocks if b in pool.blocks.free]
    found["references of blocks that were free"] = [pool.blocks.references[block] for block in again.blocks]
    return found


def others_stay(m):
    """What one text writes, no other can read."""
    pool, table = Pool(m), m.Table()
    pool.write(table, "abcdef")
    other = pool.blocks.fork(table)
    pool.write(other, "XYZ")
    pool.write(table, "ghi")
    return (pool.read(table), pool.read(other)) == ("abcdefghi", "abcdefXYZ")


COUNTED = "self.references[block] += 1"
SHARED = """        for block in table.blocks:
            if self.references[block] == 0:
                del self.free[block]
            self.references[block] += 1
        return Table(list(table.blocks), """
FIRST = "first = table.length // self.block_size"
LAST = "last = min(self.count(length), len(table.blocks))"
ROOM = "while len(table.blocks) < self.count(length):"

COPY = Exercise(
    number="9.3",
    title="Fork, and copy on write",
    minutes=30,
    functions=("Blocks.fork", "Blocks.grow", "Blocks.shared_writes"),
    question="Four answers to one prompt are to be written. The prompt fills six blocks and a quarter of the "
    "seventh. Which blocks can the answers share, and until when?",
    shapes="fork(table): another Table of the same blocks, with one more reference each. "
    "shared_writes(table, length): indices i in the table, from the block of position table.length to that "
    "of length - 1, if the block is there and has more than one reference. grow: afterwards the table has "
    "count(length) blocks, at least.",
    steps="1. fork: count one more reference for each block; a block that had none is no longer free. Give "
    "the new table lists of its own.\n"
    "2. shared_writes: the first block that is written to holds position table.length. Go on to the last "
    "one that is written to, but not beyond the table. Keep those with more than one reference.\n"
    "3. grow: for each of these, take a block, copy the content into it, put it in the table, and count one "
    "reference less for the old one.\n"
    "4. Then take blocks until there are enough.",
    afterwards="The last holder of a block does not copy it: by then it has one reference. Beam search "
    "lives on this, since its beams fork in every step.",
    probes=(forks, borders),
    properties={"what one text writes, no other can read": others_stay},
    mistakes=(
        Mistake(
            "same list",
            (("return Table(list(table.blocks), ", "return Table(table.blocks, "),),
            "A fork and its original have the same list of blocks.",
            "a block that one of them takes or replaces appears in the other's table, too.",
            "what the new table is made from.",
        ),
        Mistake(
            "same hashes",
            (("list(table.hashes), ", "table.hashes, "),),
            "A fork and its original have the same list of hashes.",
            "the texts part, and the hashes of one would be taken for those of the other.",
            "what the new table is made from.",
        ),
        Mistake(
            "hashes lost",
            (("list(table.hashes), ", "[], "),),
            "A fork has no hashes.",
            "the chain begins anew in the middle of the text: its next full block gets the hash of a text "
            "that begins there.",
            "the fields of the new table.",
        ),
        Mistake(
            "length lost",
            (("list(table.hashes), table.length)", "list(table.hashes))"),),
            "A fork has the length 0.",
            "its whole text would be computed again, and all shared blocks copied for that.",
            "the fields of the new table.",
        ),
        Mistake(
            "not counted",
            ((COUNTED, "pass"),),
            "A fork does not count references.",
            "the blocks look as if one table held them: both write to the same block, and the first that is "
            "complete frees it.",
            "the count of each block of the table.",
        ),
        Mistake(
            "still free",
            (("del self.free[block]", "pass"),),
            "A block that was free is held again, and is still among the free ones.",
            "somebody will take it and write over its content. Blocks that a match finds are often free.",
            "a block that had no references before.",
        ),
        Mistake(
            "copied at once",
            (
                (
                    SHARED,
                    """        copies = [self.take() for _ in table.blocks]
        for block, copy in zip(table.blocks, copies, strict=True):
            self.copy(block, copy)
        return Table(copies, """,
                ),
            ),
            "A fork copies all blocks.",
            "four answers to a long prompt would need four times its memory, though only the last block will "
            "ever differ.",
            "what fork does with the blocks.",
        ),
        Mistake(
            "full ones, too",
            ((FIRST, "first = 0"),),
            "Full blocks at the beginning are copied, too.",
            "nobody writes to them any more. Copying them gives up what sharing gained.",
            "the first block that is written to.",
        ),
        Mistake(
            "last block not copied",
            ((FIRST, "first = self.count(table.length)"),),
            "The half-full last block is shared, and is written to without a copy.",
            "both texts write their next token to the same place: each reads the other's.",
            "the first block that is written to: the division is rounded down.",
        ),
        Mistake(
            "ends too early",
            ((LAST, "last = min(length // self.block_size, len(table.blocks))"),),
            "The last block that is written to is not copied unless it is filled.",
            "other texts read what is written there.",
            "the end of the range of blocks.",
        ),
        Mistake(
            "beyond the length",
            ((LAST, "last = len(table.blocks)"),),
            "Blocks behind the last new token are copied, too.",
            "they are not written to yet, so the copies are made too early, and perhaps for nothing.",
            "the end of the range of blocks.",
        ),
        Mistake(
            "copied though alone",
            (("self.references[table.blocks[i]] > 1", "self.references[table.blocks[i]] > 0"),),
            "A block is copied although nobody else holds it.",
            "every step would copy a block, and the old one is lost: it has no reference, and is not free.",
            "the number of references from which a block is shared.",
        ),
        Mistake(
            "never copied",
            (("for i in self.shared_writes(table, length):", "for i in []:"),),
            "Shared blocks are never copied.",
            "a text overwrites the keys and values of all others that hold the block.",
            "what happens in grow before new blocks are taken.",
        ),
        Mistake(
            "empty copy",
            (("self.copy(shared, table.blocks[i])", "pass"),),
            "The new block replaces the shared one, but its content is not copied.",
            "the tokens before the new one are lost: the text continues behind a gap.",
            "what happens between taking the block and writing to it.",
        ),
        Mistake(
            "copied backwards",
            (("self.copy(shared, table.blocks[i])", "self.copy(table.blocks[i], shared)"),),
            "The content of the new block is copied into the shared one.",
            "that erases what all others read.",
            "the order of the two arguments: from, to.",
        ),
        Mistake(
            "reference kept",
            (("self.references[shared] -= 1", "pass"),),
            "After the copy, the old block still counts the table that has left it.",
            "it will never become free, and its last holder makes a copy that nobody needs.",
            "the count of the block that was replaced.",
        ),
        Mistake(
            "one block too many",
            ((ROOM, "while len(table.blocks) < length // self.block_size + 1:"),),
            "At the end of a block, one block too many is taken.",
            "with blocks of 16, one text in 16 holds an empty block that others may be waiting for.",
            "how many blocks a length needs if it is a multiple of the block size.",
        ),
        Mistake(
            "one block too few",
            ((ROOM, "while len(table.blocks) < length // self.block_size:"),),
            "There is no room for the tokens behind the last full block.",
            "the next token has no place to be written to.",
            "how many blocks a length needs if it is not a multiple of the block size.",
        ),
        Mistake(
            "room in the last block ignored",
            ((ROOM, "for _ in range(self.count(length - table.length)):"),),
            "Each call takes new blocks, although there was room in the last one.",
            "a text that grows by one token a step would take one block a step, and nearly all of its "
            "places would stay empty.",
            "the number of blocks that the table has already.",
        ),
    ),
    rewrites=(
        Rewrite(
            "dataclasses.replace, and copies in one pass",
            """
import dataclasses

class Blocks:
    def fork(self, table):
        for block in table.blocks:
            self.free.pop(block, None)
            self.references[block] = self.references[block] + 1
        return dataclasses.replace(table, blocks=table.blocks[:], hashes=table.hashes[:])

    def shared_writes(self, table, length):
        size = self.block_size
        return [
            i
            for i, block in enumerate(table.blocks)
            if self.references[block] > 1 and (i + 1) * size > table.length and i * size < length
        ]

    def grow(self, table, length):
        for i in self.shared_writes(table, length):
            new, old = self.take(), table.blocks[i]
            self.copy(old, new)
            self.give_back(old)
            table.blocks[i] = new
        missing = (length + self.block_size - 1) // self.block_size - len(table.blocks)
        table.blocks.extend(self.take() for _ in range(missing))
""",
        ),
        Rewrite(
            "positions instead of blocks",
            """
class Blocks:
    def shared_writes(self, table, length):
        written = sorted({position // self.block_size for position in range(table.length, length)})
        return [i for i in written if i < len(table.blocks) and self.references[table.blocks[i]] >= 2]
""",
        ),
        Rewrite(
            "a shallow copy",
            """
import copy

class Blocks:
    def fork(self, table):
        for block in table.blocks:
            if not self.references[block]:
                self.free.pop(block)
            self.references[block] += 1
        other = copy.copy(table)
        other.hashes = table.hashes.copy()
        return other
""",
            mistake="same list",
        ),
        Rewrite(
            "blocks that begin behind the length",
            """
class Blocks:
    def shared_writes(self, table, length):
        size = self.block_size
        indices = [i for i in range(len(table.blocks)) if i * size >= table.length and i * size < length]
        return [i for i in indices if self.references[table.blocks[i]] > 1]
""",
            mistake="last block not copied",
        ),
    ),
)

# ---- predictions


def pool_of(block_size: int):
    from deploy.serving import blocks

    return blocks, blocks.Blocks(100, block_size, lambda source, target: None)


def blocks_of(length: int) -> int:
    return pool_of(16)[1].count(length)


def left_to_compute(length: int) -> int:
    """Of a prompt that was computed before."""
    tokens = list(range(length))
    _, blocks = pool_of(16)
    add_text(blocks, tokens)
    return length - blocks.match(tokens).length


def blocks_of_answers(prompt: int, answer: int, n: int) -> int:
    """How many blocks n answers to one prompt hold."""
    module, blocks = pool_of(16)
    first = module.Table()
    blocks.grow(first, prompt)
    first.length = prompt
    for table in [blocks.fork(first) for _ in range(n - 1)] + [first]:
        blocks.grow(table, prompt + answer)
    return sum(count > 0 for count in blocks.references)


def evicted_first() -> str:
    """Which block of a complete text is taken first: that of its beginning, or that of its end."""
    _, blocks = pool_of(2)
    table = add_text(blocks, list(range(8)))
    order = list(table.blocks)
    blocks.release(table)
    reused = [block for block in blocks.free if block in order]
    return "its beginning" if reused[0] == order[0] else "its end"


QUESTIONS = (
    Question(
        "A prompt has 100 tokens, and a block 16. How many blocks does it need?",
        lambda: blocks_of(100),
        "100 / 16 is 6.25, so {answer} blocks, and 12 places of the last one are empty.",
    ),
    Question(
        "A prompt of 64 tokens was answered before, and its four blocks of 16 are all in the cache. How "
        "many of its tokens are computed when it comes again?",
        lambda: left_to_compute(64),
        "At least one must be computed, because the cache has no logits; only full blocks are shared, so it "
        "is the last block: {answer} tokens.",
    ),
    Question(
        "A prompt of 100 tokens gets four answers of 20 tokens each. How many blocks of 16 do all of them "
        "hold?",
        lambda: blocks_of_answers(100, 20, 4),
        "Each text of 120 tokens has 8 blocks. The first 6 are full and shared, the other 2 are its own: 6 "
        "+ 4 · 2 = {answer}, instead of 32.",
    ),
    Question(
        "A text is complete, and its blocks become free. Which of them is evicted first?",
        evicted_first,
        "It is {answer}: other texts are more likely to share the beginning, and without it the rest cannot "
        "be found.",
        choices=("its beginning", "its end"),
    ),
)

CHAPTER = Chapter(
    number="9",
    name="serving",
    title="serving",
    source="deploy/serving/blocks.py",
    exercises=(COUNTING, PREFIXES, COPY),
    questions=QUESTIONS,
)
