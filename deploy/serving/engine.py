"""Generates many texts at once: requests come and go between two steps of the model.

    engine = Engine.of_run("runs/X")
    for (answer,) in engine.generate(["Once upon a time", "To be"], SamplingParams(max_tokens=50)):
        print(answer.text)

A server calls `add` and `abort` whenever it likes, and `step` as long as `has_work`.
"""

import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch

from data.tokenizers import end_tokens
from deploy.serving import attention, sampling
from deploy.serving.beams import BeamSearch
from deploy.serving.blocks import Blocks, Swap
from deploy.serving.drafting import Drafter, check_can_draft
from deploy.serving.graphs import Graphs, can_be_recorded
from deploy.serving.pool import Batch, HostMemory, Pool, block_bytes
from deploy.serving.sampling import Logprob, SamplingParams, Writer
from deploy.serving.scheduler import Scheduler, Sequence
from lab import device as devices
from lab.errors import UserError
from lab.sampling import packed
from lab.storage import runs

MB = 1e6
FEW = 16  # so few tokens of a prompt cost less as rows of a decoding step than in a pass of their own
SHARE_OF_FREE = 0.25  # of the free memory, if cache_memory is not given


@dataclass
class Output:
    """What a step has added to a text."""

    request_id: str
    index: int
    """Which of the request's n texts."""
    token_ids: list[int] = field(default_factory=list)
    """New tokens. A token that ends the text is not among them."""
    text: str = ""
    """New text; what may begin a stop string, and half a character, is held back until it is certain."""
    logprobs: list[Logprob] | None = None
    """One entry for each of token_ids, if the request asks for them."""
    finish_reason: str | None = None
    """stop: an end-of-text token or a stop string; length: max_tokens, or the model has no more positions."""
    score: float | None = None
    """Of a text from beam search: total log-probability / length ** length_penalty, with its end token."""


@dataclass
class Request:
    """What the engine remembers of a request until all its texts are finished."""

    params: SamplingParams
    sequences: list[Sequence]
    search: BeamSearch | None = None  # if it has beams
    whole: dict[int, Output] = field(default_factory=dict)  # for best_of: everything so far, by index
    scores: dict[int, float] = field(default_factory=dict)  # and how good it is


class Engine:
    """A model, its cache and its requests.

    cache_memory: in MB; None: a quarter of what is free. cache_blocks: how many blocks instead.
    swap_memory: in MB, of the CPU's memory, for the blocks of preempted requests; 0: they are computed again.
    int8_cache: stores keys and values in 8 bits, so that about twice as many tokens fit as in 16 bits.

    token_budget: how many tokens a step computes at most, drafts included. More make prompts faster, and the
    step longer for those who wait for their next token. end_tokens: tokens that end every text, except with
    ignore_eos. draft: the model's MTP block drafts up to draft_tokens tokens of each text, which the model
    verifies in one step (stage 7). The texts stay the same.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        cache_memory: float | None = None,
        block_size: int = 16,
        max_batch: int = 16,
        token_budget: int = 512,
        prefix_cache: bool = True,
        end_tokens: Collection[int] = (),
        cache_blocks: int | None = None,
        swap_memory: float = 0,
        int8_cache: bool = False,
        draft: bool = False,
        draft_tokens: int = 2,
    ):
        self.model, self.tokenizer, self.end_tokens = model, tokenizer, frozenset(end_tokens)
        self.device = next(model.parameters()).device
        attention.use(model)
        self.longest = model.config.block_size
        if block_size < 1 or max_batch < 1:
            raise UserError(f"block_size ({block_size}) and max_batch ({max_batch}) must be at least 1")
        if draft:
            check_can_draft(model, draft_tokens)
            token_budget = max(token_budget, max_batch * (1 + draft_tokens))
        bytes_of_a_block = block_bytes(model, block_size, int8_cache, draft)
        if cache_blocks is None:
            cache_blocks = count_blocks(
                model, cache_memory, block_size, max_batch, self.device, bytes_of_a_block
            )
        n_blocks = cache_blocks + 1  # and the null block
        self.pool = Pool(model, n_blocks, block_size, int8_cache, draft)
        self.blocks = Blocks(n_blocks, block_size, self.pool.copy, prefix_cache)
        n_places = int(swap_memory * MB / bytes_of_a_block)
        host = HostMemory(self.pool, n_places)
        swap = Swap(n_places, host.save, host.load) if n_places else None
        vocab_size = self.tokenizer.vocab_size
        self.drafter = Drafter(model, self.pool, self.blocks, vocab_size, draft_tokens) if draft else None
        n_drafts = self.drafter.n_useful if draft else None
        self.scheduler = Scheduler(self.blocks, max_batch, token_budget, swap, n_drafts)
        records = self.device.type == "cuda" and not draft and can_be_recorded(model)
        self.graphs = Graphs(model, self.pool) if records else None
        self.requests: dict[str, Request] = {}
        self.n_added = self.n_steps = 0
        self.plan: dict[Sequence, int] = {}  # of the last step, for those who watch
        self.drafts: dict[Sequence, list[int]] = {}  # likewise

    @classmethod
    def of_run(
        cls, folder, checkpoint: str = "best", device: str = "auto", dtype: str = "auto", **options
    ) -> "Engine":
        """The engine of a run, with its end-of-text tokens. Says on stderr how large its cache is."""
        folder, where = Path(folder), devices.choose(device)
        devices.prepare(where)
        config = runs.read_config(folder)
        number_format = devices.sampling_dtype(dtype, runs.weights_dtype(folder, config), where)
        model, _ = runs.load(folder, checkpoint, where, number_format)
        packed.pack(model)
        tokenizer = runs.tokenizer(folder)
        ends = end_tokens(folder, runs.read_meta(folder), tokenizer)
        engine = cls(model, tokenizer, end_tokens=ends, **options)
        print(engine.describe(), file=sys.stderr)
        return engine

    def describe(self) -> str:
        """One line about the cache."""
        n_blocks, size = self.pool.n_blocks - 1, self.pool.block_size
        return f"cache: {n_blocks:,} blocks of {size} tokens, {self.pool.nbytes / MB:,.0f} MB"

    # --- Requests ---

    def add(self, request_id: str, prompt_tokens: list[int], params: SamplingParams) -> None:
        """Queues a request. Raises UserError if it can never be answered."""
        prompt = [int(token) for token in prompt_tokens]
        if request_id in self.requests:
            raise UserError(f"there is a request {request_id!r} already: give each a name of its own")
        if not prompt:
            raise UserError("the prompt has no tokens: give at least one")
        vocab_size = self.tokenizer.vocab_size
        for token in (*prompt, *params.logit_bias):
            if not 0 <= token < vocab_size:
                raise UserError(f"there is no token {token}: the model has the tokens 0 to {vocab_size - 1}")
        if len(prompt) >= self.longest:
            raise UserError(
                f"the prompt has {len(prompt):,} tokens, and the model {self.longest:,} positions for it and "
                "its answer\nshorten it"
            )
        longest = min(len(prompt) + params.max_tokens, self.longest)
        n_blocks = params.beams * self.blocks.count(longest - 1)  # the last token is never computed
        if n_blocks > self.pool.n_blocks - 1:
            room = (self.pool.n_blocks - 1) * self.pool.block_size
            beams = f" in each of its {params.beams} beams" if params.beams > 1 else ""
            raise UserError(
                f"the request may have {longest:,} tokens{beams}, and the cache has room for {room:,}\n"
                "lower its max_tokens, or give the cache more memory"
            )
        ends = frozenset() if params.ignore_eos else self.end_tokens
        sizes = (longest - len(prompt), vocab_size, self.scheduler.max_batch)
        search = BeamSearch(params, ends, *sizes) if params.beams > 1 else None
        self.n_added += 1
        first = self.new_sequence(request_id, 0, (self.n_added, 0), params, prompt)
        self.requests[request_id] = Request(params, [first], search)
        self.scheduler.add(first)

    def new_sequence(self, request_id, index, order, params, prompt) -> Sequence:
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed + index)
        writer = Writer(self.tokenizer.stream(prompt), params.stop)
        return Sequence(request_id, index, order, params, prompt, writer, generator)

    def abort(self, request_id: str) -> None:
        """Frees what a request holds. Nothing happens if it is finished or unknown."""
        request = self.requests.pop(request_id, None)
        for sequence in request.sequences if request else ():
            self.scheduler.remove(sequence)

    def has_work(self) -> bool:
        return bool(self.requests)

    # --- A step ---

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Computes the next tokens of all that run. Returns what is new, one output for each text."""
        self.plan = self.scheduler.schedule()
        self.n_steps += 1
        self.drafts = drafts = self.drafter.draft(self.plan) if self.drafter else {}
        groups: dict[tuple[int, bool, int], list[Sequence]] = {}  # those that the model computes together
        is_decoding = 1 in self.plan.values() and not self.drafter and not self.graphs
        for sequence, n_new in self.plan.items():
            is_first = n_new > 1 and sequence.table.length == 0
            n_drafts = len(drafts.get(sequence, ()))
            if is_decoding and n_new <= FEW:  # joins the decoding texts, with a row for each token
                n_new, is_first = 1, False
            groups.setdefault((n_new - n_drafts, is_first, n_drafts), []).append(sequence)
        ready, rows = [], []
        for (n_new, *_), sequences in groups.items():
            if self.drafter:
                logits = self.drafter.forward(sequences, [next_tokens(s, n_new) for s in sequences], drafts)
            else:
                logits = self.forward(sequences, n_new)
            for sequence in sequences:
                length = sequence.table.length + self.plan[sequence] - len(drafts.get(sequence, ()))
                self.blocks.computed(sequence.table, sequence.tokens, length)
            done = [i for i, sequence in enumerate(sequences) if sequence.n_left == 0]
            ready += [sequences[i] for i in done]
            rows.append(logits[done])
        if not ready:
            return []
        logits = torch.cat(rows).cpu()
        ready, logits = self.fork(ready, logits)
        ready, logits, texts_of_beams = self.search(ready, logits)
        outputs = self.write(ready, logits)
        if drafts:
            self.accept(drafts, ready, outputs)
        self.scheduler.limit()
        return self.finished(outputs) + texts_of_beams

    def forward(self, sequences: list[Sequence], n_new: int) -> torch.Tensor:
        """Logits (B, vocab_size) after the planned tokens of each sequence, a row for every n_new of them."""
        rows = [(s, done) for s in sequences for done in range(0, self.plan[s], n_new)]
        last = [n - 1 for n in accumulate(self.plan[s] // n_new for s in sequences)]  # of each sequence
        tables, starts = [s.table.blocks for s, _ in rows], [s.table.length + done for s, done in rows]
        new = [next_tokens(s, n_new, done) for s, done in rows]
        if self.graphs and n_new == 1:
            logits = self.graphs.decode([token for (token,) in new], tables, starts)
            return logits[:, -1, : self.tokenizer.vocab_size]
        batch = Batch(self.pool, tables, starts, n_new)

        # Only the last token's logits are wanted; in a prefill, the others would cost more than a layer.
        def keep_last(module, inputs):
            return (inputs[0][last, -1:],)

        hook = self.model.lm_head.register_forward_pre_hook(keep_last)
        try:
            logits, _ = self.model(torch.tensor(new, device=self.device), cache=batch)
        finally:
            hook.remove()
        return logits[:, -1, : self.tokenizer.vocab_size]

    def fork(self, ready: list[Sequence], logits: torch.Tensor) -> tuple[list[Sequence], torch.Tensor]:
        """Adds the other texts of requests whose prompts are now computed; they share the logits."""
        everything, rows = [], []
        for row, sequence in enumerate(ready):
            everything.append(sequence)
            if sequence.params.n_texts > 1 and not sequence.is_forked:

                def make(index, first=sequence):
                    order = (first.order[0], index)
                    return self.new_sequence(first.request_id, index, order, first.params, first.prompt)

                forks = self.scheduler.fork(sequence, make)
                self.requests[sequence.request_id].sequences += forks
                everything += forks
                for each in (sequence, *forks):
                    each.is_forked = True
            rows += [row] * (len(everything) - len(rows))
        return everything, logits[rows] if len(rows) > len(ready) else logits

    def write(self, ready: list[Sequence], logits: torch.Tensor) -> list[Output]:
        """Draws and notes the next token of each."""
        tokens = sampling.draw(logits, ready)
        found = self.logprobs(ready, logits, tokens)
        return [self.note(*each) for each in zip(ready, tokens, found, strict=True)]

    def accept(self, drafts: dict[Sequence, list[int]], ready: list[Sequence], outputs: list[Output]) -> None:
        """Continues texts as long as the token that was drawn is the one that was drafted.

        The model has computed the drafts too, so the logits after such a token are known already.
        """
        rows = [(s, output) for s, output in zip(ready, outputs, strict=True) if s in drafts]
        for i in range(self.drafter.n_drafts):
            rows = [(s, o) for s, o in rows if o.token_ids == drafts[s][: i + 1] and not o.finish_reason]
            if not rows:
                break
            sequences = [sequence for sequence, _ in rows]
            logits = self.drafter.accept(sequences, i)
            for (_, output), new in zip(rows, self.write(sequences, logits), strict=True):
                extend(output, new)
        self.drafter.forget(drafts)

    def search(
        self, ready: list[Sequence], logits: torch.Tensor
    ) -> tuple[list[Sequence], torch.Tensor, list[Output]]:
        """Continues the beams. Returns the other sequences, their logits, and the texts that are found."""
        others = [row for row, sequence in enumerate(ready) if sequence.params.beams == 1]
        if len(others) == len(ready):
            return ready, logits, []
        for row in set(range(len(ready))).difference(others):
            self.requests[ready[row].request_id].search.logits[ready[row].index] = logits[row]
        outputs = []
        for name, request in list(self.requests.items()):
            beams, search = request.sequences, request.search
            if not search or any(beam.n_left for beam in beams):
                continue  # if some beams were preempted, the others wait for them
            for index, found in enumerate(search.advance(beams, self.blocks)):
                text = "".join(map(self.tokenizer.stream(beams[0].prompt), (*found.tokens, None)))
                logprobs = found.logprobs if request.params.logprobs is not None else None
                ending = (found.finish_reason, found.score)
                outputs.append(Output(name, index, found.tokens, text, logprobs, *ending))
            if search.is_over:
                self.abort(name)  # frees what its beams hold
        return [ready[row] for row in others], logits[others], outputs

    def logprobs(
        self, ready: list[Sequence], logits: torch.Tensor, tokens: list[int]
    ) -> list[Logprob | None]:
        """Those that the requests need, None for the others."""
        found: list[Logprob | None] = [None] * len(ready)
        needed = [i for i, s in enumerate(ready) if s.params.logprobs is not None or s.params.best_of]
        if needed:
            n_top = max(ready[i].params.logprobs or 0 for i in needed)
            entries = sampling.logprobs(logits[needed], [tokens[i] for i in needed], n_top)
            for i, entry in zip(needed, entries, strict=True):
                found[i] = Logprob(entry.logprob, entry.top[: ready[i].params.logprobs or 0])
        return found

    def note(self, sequence: Sequence, token: int, logprob: Logprob | None) -> Output:
        """Adds a token to a text, and ends it if it is complete."""
        params, writer = sequence.params, sequence.writer
        output = Output(sequence.request_id, sequence.index)
        if params.logprobs is not None:
            output.logprobs = []
        if token in params.stop_token_ids or (token in self.end_tokens and not params.ignore_eos):
            output.finish_reason = "stop"
        else:
            sequence.generated.append(token)
            output.token_ids.append(token)
            if logprob:
                sequence.logprob += logprob.logprob
            if params.logprobs is not None:
                output.logprobs.append(logprob)
            output.text = writer.add(token)
            if writer.stopped:
                output.finish_reason = "stop"
            elif len(sequence.generated) == params.max_tokens or sequence.n_tokens >= self.longest:
                output.finish_reason = "length"
        if output.finish_reason:
            if not writer.stopped:
                output.text += writer.add(None)
                if writer.stopped:  # the last half of a character completed a stop string
                    output.finish_reason = "stop"
            self.scheduler.remove(sequence)
        return output

    def finished(self, outputs: list[Output]) -> list[Output]:
        """Forgets requests that are complete. With best_of, their texts are chosen and returned now."""
        returned = []
        for output in outputs:
            request = self.requests[output.request_id]
            best_of = request.params.n_texts > request.params.n
            if best_of:
                extend(
                    request.whole.setdefault(output.index, Output(output.request_id, output.index)), output
                )
            else:
                returned.append(output)
            if output.finish_reason:
                sequence = next(s for s in request.sequences if s.index == output.index)
                request.sequences.remove(sequence)
                if best_of:
                    request.scores[output.index] = sequence.logprob / max(1, len(sequence.generated))
            if not request.sequences:
                del self.requests[output.request_id]
                if best_of:
                    best = sorted(request.scores, key=request.scores.get, reverse=True)
                    for rank, index in enumerate(best[: request.params.n]):
                        request.whole[index].index = rank
                        returned.append(request.whole[index])
        return returned

    # --- For scripts, and for those who watch ---

    def generate(self, prompts: list, params: SamplingParams | list[SamplingParams]) -> list[list[Output]]:
        """Continues prompts, which are texts or lists of tokens. Returns, for each, its n whole texts."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        names = [f"generate-{self.n_added + i}" for i in range(len(prompts))]
        texts: dict[tuple[str, int], Output] = {}
        try:
            for name, prompt, wanted in zip(names, prompts, each, strict=True):
                self.add(name, self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, wanted)
            while any(name in self.requests for name in names):
                for output in self.step():
                    key = (output.request_id, output.index)
                    extend(texts.setdefault(key, Output(*key)), output)
        finally:
            for name in names:
                self.abort(name)
        return [[texts[name, i] for i in range(p.n)] for name, p in zip(names, each, strict=True)]

    def forget_prefixes(self) -> None:
        """Empties the prefix cache of what nobody holds."""
        for block in self.blocks.free:
            self.blocks.forget(block)

    def blocks_of(self, request_id: str) -> list[list[tuple[int, int]]]:
        """For each text of a request: its blocks in order, each with how many texts hold it."""
        request = self.requests.get(request_id)
        tables = [s.table.blocks for s in request.sequences] if request else []
        return [[(block, self.blocks.references[block]) for block in table] for table in tables if table]

    def stats(self) -> dict[str, float]:
        """Counts for a dashboard."""
        n_blocks = self.pool.n_blocks - 1
        running = self.scheduler.running
        n_used = n_blocks - len(self.blocks.free)
        last = {s.table.blocks[-1]: s.table.length for s in running}  # blocks before the last are full
        n_empty = sum(-length % self.pool.block_size for length in last.values())
        return {
            "running": len(running),
            "waiting": len(self.scheduler.waiting),
            "cache_use": n_used / n_blocks,
            "cache_waste": n_empty / (n_used * self.pool.block_size) if n_used else 0.0,
            "prefix_hits": self.scheduler.n_hits,
            "preemptions": self.scheduler.n_preempted,
            "swapped": self.scheduler.n_swapped,
            "drafted_tokens": self.drafter.n_drafted if self.drafter else 0,
            "accepted_tokens": self.drafter.n_accepted if self.drafter else 0,
            "blocks": n_blocks,
            "steps": self.n_steps,
        }


def next_tokens(sequence: Sequence, n_new: int, done: int = 0) -> list[int]:
    """The n_new tokens to compute next, after `done` others."""
    start = sequence.table.length + done
    if n_new == 1 and sequence.generated:  # most often; without a copy of the whole text
        return (
            [sequence.generated[start - len(sequence.prompt)]]
            if start >= len(sequence.prompt)
            else [sequence.prompt[start]]
        )
    return sequence.tokens[start : start + n_new]


def extend(whole: Output, new: Output) -> None:
    """Adds what is new to the text so far."""
    whole.token_ids += new.token_ids
    whole.text += new.text
    if new.logprobs is not None:
        whole.logprobs = (whole.logprobs or []) + new.logprobs
    whole.finish_reason, whole.score = new.finish_reason, new.score


def count_blocks(
    model, cache_memory: float | None, block_size: int, max_batch: int, device, size: int
) -> int:
    """How many blocks, of `size` bytes, fit into the memory, but no more than are ever useful."""
    wanted = cache_memory * MB if cache_memory is not None else free_memory(device) * SHARE_OF_FREE
    most = 2 * max_batch * -(-model.config.block_size // block_size)  # as many again for the prefix cache
    n_blocks = min(int(wanted / size), most)
    if n_blocks < 1:
        raise UserError(
            f"the cache needs at least {size / MB:.3g} MB, for one block of {block_size} tokens, and has "
            f"{wanted / MB:.3g}\ngive it more memory, or a smaller block size"
        )
    return n_blocks


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return 4 * 2**30
