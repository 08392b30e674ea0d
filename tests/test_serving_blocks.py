"""The blocks of the paged cache and the scheduler, without a model: who holds what, after any history."""

import pytest
import torch

pytest.importorskip("hypothesis", reason="these tests need pip install -e '.[dev]'")

from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st

from deploy.serving.beams import BeamSearch
from deploy.serving.blocks import NULL, Blocks, Swap, Table
from deploy.serving.sampling import SamplingParams
from deploy.serving.scheduler import Scheduler, Sequence


class Simulated:
    """A scheduler whose model computes, as "keys and values" of a token, the tokens up to it."""

    def __init__(self, n_blocks, block_size, max_batch=4, token_budget=64, share_prefixes=True, n_places=0):
        self.content = [[None] * block_size for _ in range(n_blocks)]
        self.blocks = Blocks(n_blocks, block_size, self.copy, share_prefixes)
        self.saved = [None] * n_places
        self.swap = Swap(n_places, self.save, self.load) if n_places else None
        self.scheduler = Scheduler(self.blocks, max_batch, token_budget, self.swap)
        self.n_added = 0
        self.size = block_size
        self.searches = {}  # of requests with beams
        self.done = []

    def copy(self, source, target):
        self.content[target] = list(self.content[source])

    def save(self, block, place):
        self.saved[place] = list(self.content[block])

    def load(self, place, block):
        self.content[block] = list(self.saved[place])

    def add(self, prompt, max_tokens=3, n=1, beams=1):
        self.n_added += 1
        params = SamplingParams(max_tokens=max_tokens, n=n, beams=beams)
        if beams > 1:
            sizes = (max_tokens, N_BEAM_TOKENS, self.scheduler.max_batch)
            self.searches[str(self.n_added)] = BeamSearch(params, frozenset(), *sizes)
        sequence = Sequence(str(self.n_added), 0, (self.n_added, 0), params, list(prompt), None, None)
        self.scheduler.add(sequence)
        return sequence

    def sequences(self):
        return self.scheduler.running + self.scheduler.waiting

    def step(self):
        plan = self.scheduler.schedule()
        assert sum(plan.values()) <= self.scheduler.token_budget
        assert plan or not self.sequences(), "nobody can go on"
        assert set(plan) <= set(self.scheduler.running)
        for sequence, n_new in plan.items():
            self.check_content(sequence)
            for position in range(sequence.table.length, sequence.table.length + n_new):
                block = sequence.table.blocks[position // self.size]
                self.content[block][position % self.size] = tuple(sequence.tokens[: position + 1])
        for sequence, n_new in plan.items():
            self.blocks.computed(sequence.table, sequence.tokens, sequence.table.length + n_new)
        for sequence in [s for s in plan if s.n_left == 0]:
            every = [sequence]
            if not sequence.is_forked:

                def make(index, of=sequence):
                    return Sequence(
                        of.request_id, index, (of.order[0], index), of.params, of.prompt, None, None
                    )

                every += self.scheduler.fork(sequence, make)
            for each in every:
                each.is_forked = True
                if each.params.beams > 1:
                    self.searches[each.request_id].logits[each.index] = beam_logits(each.tokens)
                    continue
                each.generated.append((sum(each.tokens) + each.index) % 2)
                if len(each.generated) == each.params.max_tokens:
                    self.scheduler.remove(each)
                    self.done.append(each)
        self.search()
        self.scheduler.limit()
        self.check()
        return plan

    def search(self):
        """Continues the beams of requests whose beams are all computed."""
        for name, search in list(self.searches.items()):
            beams = [s for s in self.sequences() if s.request_id == name]
            if not any(beam.n_left for beam in beams):
                search.advance(beams, self.blocks)
                if search.is_over:
                    self.done.append(beams[0])
                    self.abort(name)

    def abort(self, name):
        self.searches.pop(name, None)
        for sequence in [s for s in self.sequences() if s.request_id == name]:
            self.scheduler.remove(sequence)

    def finish(self):
        for _ in range(3000):
            if not self.sequences():
                return
            self.step()
        raise AssertionError("it never ends")

    def check_content(self, sequence):
        for position in range(sequence.table.length):
            block = sequence.table.blocks[position // self.size]
            assert self.content[block][position % self.size] == tuple(sequence.tokens[: position + 1])

    def check(self):
        blocks, scheduler = self.blocks, self.scheduler
        held = [block for sequence in self.sequences() for block in sequence.table.blocks]
        assert blocks.references == [held.count(block) for block in range(len(blocks.references))]
        assert NULL not in held and NULL not in blocks.free
        assert set(blocks.free) == {b for b in range(1, len(self.content)) if not blocks.references[b]}
        hashed = {digest: block for block, digest in enumerate(blocks.hashes) if digest is not None}
        assert blocks.by_hash == hashed
        for digest, block in hashed.items():  # a hash stands for the content and all that was before it
            table, prefix = Table(), self.content[block][-1]
            for i in range(0, len(prefix), self.size):
                table.hashes.append(blocks.next_hash(table, list(prefix[i : i + self.size])))
            assert table.hashes[-1] == digest
        for sequence in self.sequences():
            self.check_content(sequence)
        orders = [sequence.order for sequence in self.sequences()]
        assert orders == sorted(orders), "a newer sequence runs while an older one waits"
        assert len(scheduler.running) <= scheduler.max_batch
        assert not any(sequence.table.blocks for sequence in scheduler.waiting)
        saved = [place for s in self.sequences() if s.saved for place in s.saved.places]
        assert sorted(saved + (self.swap.free if self.swap else [])) == list(range(len(self.saved)))


N_BEAM_TOKENS = 10  # enough for 5 beams


def beam_logits(tokens):
    """Any logits that depend on the text alone."""
    generator = torch.Generator().manual_seed(sum(3**i * token for i, token in enumerate(tokens)))
    return torch.randn(N_BEAM_TOKENS, generator=generator)


class AnyHistory(stateful.RuleBasedStateMachine):
    @stateful.initialize(
        n_blocks=st.integers(2, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_batch=st.integers(1, 5),
        token_budget=st.integers(1, 12),
        share_prefixes=st.booleans(),
        n_places=st.integers(0, 6),
    )
    def start(self, **options):
        self.simulated = Simulated(**options)
        self.room = (options["n_blocks"] - 1) * options["block_size"]

    @stateful.rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), n=st.integers(1, 3), data=st.data()
    )
    def add(self, prompt, n, data):
        prompt = prompt[: self.room]
        max_tokens = data.draw(st.integers(1, min(8, self.room - len(prompt) + 1)))
        self.simulated.add(prompt, max_tokens, n)

    @stateful.rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), beams=st.integers(2, 5), data=st.data()
    )
    def add_beams(self, prompt, beams, data):
        """As many as the engine would accept: all of them fit, even if they share nothing."""
        blocks, max_batch = self.simulated.blocks, self.simulated.scheduler.max_batch
        beams = min(beams, max_batch, len(blocks.references) - 1)
        room = (len(blocks.references) - 1) // beams * blocks.block_size
        if beams > 1:
            prompt = prompt[:room]
            max_tokens = data.draw(st.integers(1, min(8, room - len(prompt) + 1)))
            self.simulated.add(prompt, max_tokens, beams=beams)

    @stateful.rule()
    def step(self):
        self.simulated.step()

    @stateful.precondition(lambda self: self.simulated.sequences())
    @stateful.rule(data=st.data())
    def abort(self, data):
        sequence = data.draw(st.sampled_from(self.simulated.sequences()))
        self.simulated.abort(sequence.request_id)
        self.simulated.check()

    def teardown(self):
        if hasattr(self, "simulated"):
            self.simulated.finish()
            assert len(self.simulated.blocks.free) == len(self.simulated.content) - 1
            assert len(self.simulated.swap.free if self.simulated.swap else []) == len(self.simulated.saved)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def compute(simulated, *prompts):
    """Answers the prompts, one after the other."""
    for prompt in prompts:
        simulated.add(prompt, max_tokens=1)
        simulated.finish()


def test_a_reused_block_loses_its_old_hash():
    simulated = Simulated(n_blocks=3, block_size=2)
    compute(simulated, [0, 0, 0])
    assert simulated.blocks.match([0, 0, 1]).length == 2
    compute(simulated, [1, 1, 1, 1])  # takes both blocks
    assert simulated.blocks.match([0, 0, 1]).length == 0


def test_a_fully_cached_prompt_still_computes_its_last_token():
    simulated = Simulated(n_blocks=8, block_size=2)
    prompt = [0, 1, 1, 0]
    compute(simulated, prompt)
    sequence = simulated.add(prompt)
    assert simulated.step() == {sequence: 2}  # the block of the last token
    assert len(sequence.generated) == 1


def test_hits_are_counted_before_the_new_tokens_are():
    """A prompt that the prefix cache has in part needs fewer blocks, and less of the budget."""
    simulated = Simulated(n_blocks=6, block_size=2, token_budget=8)
    first = simulated.add([0, 1, 0, 1, 0, 1, 0], max_tokens=2)
    simulated.step()
    second = simulated.add([0, 1, 0, 1, 0, 1, 1], max_tokens=1)
    plan = simulated.step()  # there is 1 free block, and 3 shared ones
    assert plan == {first: 1, second: 1}


def test_an_unfinished_block_is_no_hit():
    simulated = Simulated(n_blocks=9, block_size=4, max_batch=1, token_budget=3)
    simulated.add([0, 1, 0, 1, 1])
    simulated.step()  # 3 of its 4 tokens
    assert simulated.blocks.match([0, 1, 0, 1, 1]).length == 0
    simulated.step()
    assert simulated.blocks.match([0, 1, 0, 1, 1]).length == 4


def test_of_duplicates_in_one_step_the_first_stays():
    simulated = Simulated(n_blocks=9, block_size=2)
    first, second = simulated.add([0, 1, 0]), simulated.add([0, 1, 1])
    simulated.step()
    assert first.table.blocks[0] != second.table.blocks[0]
    assert simulated.blocks.match([0, 1, 0]).blocks == first.table.blocks[:1]
    simulated.finish()


def test_a_preempted_sequence_keeps_all_its_tokens():
    simulated = Simulated(n_blocks=5, block_size=2)
    first, second = simulated.add([0, 0, 0], max_tokens=5), simulated.add([1, 1, 1], max_tokens=5)
    alone = Simulated(n_blocks=5, block_size=2)
    lonely = alone.add([1, 1, 1], max_tokens=5)
    alone.finish()
    simulated.finish()
    assert simulated.scheduler.n_preempted > 0
    assert simulated.done == [first, second] and second.generated == lonely.generated


def test_a_preempted_and_a_half_prefilled_sequence_do_not_wait_for_each_other():
    """The half-prefilled one holds blocks that the preempted one, which comes first, needs."""
    simulated = Simulated(n_blocks=7, block_size=2, token_budget=4)
    simulated.add([0] * 3, max_tokens=8)
    simulated.add([1] * 3, max_tokens=8)
    simulated.add([0, 1] * 4, max_tokens=2)
    simulated.finish()
    assert [sequence.request_id for sequence in simulated.done] == ["1", "2", "3"]
    assert simulated.scheduler.n_preempted > 0


def test_nobody_starves():
    """However many newer requests come, an old one goes on."""
    simulated = Simulated(n_blocks=7, block_size=2, max_batch=3, token_budget=5)
    old = simulated.add([0, 1, 0, 1, 1], max_tokens=7)
    for step in range(40):
        simulated.add([1, step % 2], max_tokens=2)
        simulated.step()
        if old in simulated.done:
            break
    assert old in simulated.done and step < 10


def test_tails_are_evicted_before_their_prefixes():
    simulated = Simulated(n_blocks=5, block_size=2)
    compute(simulated, [0, 1, 0, 1, 0, 1])
    assert simulated.blocks.match([0, 1, 0, 1, 0, 1, 0]).length == 6
    compute(simulated, [1, 1, 1])  # takes one block that holds nothing, and one more
    assert simulated.blocks.match([0, 1, 0, 1, 0, 1, 0]).length == 4


def test_forks_share_the_prompt_and_copy_what_they_write_to():
    simulated = Simulated(n_blocks=12, block_size=4)
    first = simulated.add([0, 1, 0, 1, 1, 1], max_tokens=4, n=3)
    simulated.step()
    tables = [s.table.blocks for s in simulated.sequences()]
    assert tables == [first.table.blocks] * 3 and len(tables[0]) == 2
    simulated.step()
    tables = [s.table.blocks for s in simulated.sequences()]
    assert len({table[0] for table in tables}) == 1 and len({table[1] for table in tables}) == 3
    simulated.finish()


def test_the_oldest_decodes_in_every_step_while_a_long_prompt_is_prefilled():
    simulated = Simulated(n_blocks=40, block_size=4, token_budget=8)
    old = simulated.add([0, 1], max_tokens=8)
    simulated.step()
    long = simulated.add([0, 1] * 15)
    plans = [simulated.step() for _ in range(4)]
    assert [plan[old] for plan in plans] == [1, 1, 1, 1]
    assert [plan[long] for plan in plans] == [7, 7, 7, 7]  # what is left of the budget


def test_forks_to_come_are_counted_when_others_are_admitted():
    """Else the newcomers would lose their rows, and what was computed for them."""
    simulated = Simulated(n_blocks=40, block_size=4, max_batch=4)
    simulated.add([0, 1, 1], n=3)
    simulated.add([1, 1, 1], n=2)
    simulated.finish()
    assert simulated.scheduler.n_preempted == 0


def test_more_texts_than_rows_take_turns():
    simulated = Simulated(n_blocks=40, block_size=4, max_batch=2)
    simulated.add([0, 1, 1], n=5)
    simulated.finish()
    assert len(simulated.done) == 5


def test_beams_that_lose_their_blocks_find_the_same_texts():
    found = []
    for older in ([], [0, 0, 0]):
        simulated = Simulated(n_blocks=9, block_size=2, share_prefixes=False)
        if older:
            simulated.add(older, max_tokens=12)
        simulated.add([1, 1, 1], max_tokens=6, beams=2)
        (search,) = simulated.searches.values()
        simulated.finish()
        found.append([(each.tokens, each.score) for each in search.found])
    assert found[0] == found[1] and simulated.scheduler.n_preempted > 0
    assert len(simulated.done) == 2 and len(simulated.blocks.free) == 8


def test_swapped_blocks_are_not_computed_again():
    computed = []
    for n_places in (0, 8):
        simulated = Simulated(n_blocks=6, block_size=2, share_prefixes=False, n_places=n_places)
        simulated.add([0, 0, 0], max_tokens=6)
        simulated.add([1, 1, 1], max_tokens=6)
        computed.append(0)
        while simulated.sequences():
            computed[-1] += sum(simulated.step().values())
        assert simulated.scheduler.n_preempted > 0
    assert computed[1] == 2 * (3 + 5) < computed[0]
