"""Translates tokenizers between GGUF and the files of Hugging Face.

GGUF's tokenizer.ggml.model says how a text is split:
- gpt2: byte-level BPE. The pattern that cuts the text before, the normalizer and the like are not in the
  file; tokenizer.ggml.pre names them. Only the names in PRE are supported.
- llama: SentencePiece's BPE with scores in the place of merges, and a token for each byte.
- rwkv: the longest token that fits. Our character tokenizer is written so: each token is one character.
"""

import json
import re
import sys
from pathlib import Path

from data.tokenizers import (
    HF_CONFIG,
    CharTokenizer,
    end_tokens,
    from_meta,
    library_tokenizer,
    read_object,
)
from deploy import tokenizer_json
from deploy.gguf_file import GGUFFile
from lab.errors import UserError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type


def split(pattern: str) -> dict:
    """A pre-tokenizer in tokenizer.json that cuts a text at a pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool = False) -> dict:
    """The pre-tokenizer that writes bytes as characters; use_regex cuts the text at GPT-2's pattern first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


DIGITS = {"type": "Digits", "individual_digits": True}
GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
GPT4 += r"\s*[\r\n]+|\s+(?!\S)|\s+"
LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = r"[^\r\n\p{L}\p{N}]?{0}*{1}+{2}|[^\r\n\p{L}\p{N}]?{0}+{1}*{2}|\p{N}{3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
WORDS += r"\s*[\r\n]+|\s+(?!\S)|\s+"


def words(endings: str, digits: str) -> str:
    """The pattern of GPT-4o and of Mistral's tekken."""
    pattern = WORDS.replace("{0}", LETTERS[0]).replace("{1}", LETTERS[1])
    return pattern.replace("{2}", endings).replace("{3}", digits)


DEEPSEEK_V3 = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
DEEPSEEK_V3 += r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CODER = [
    split("[\r\n]"),
    split(r"\s?\p{L}+"),
    split(r"\s?\p{P}+"),
    split("[一-龥ࠀ-一가-퟿]+"),
    DIGITS,
    byte_level(),
]
NFC = {"type": "NFC"}

# By tokenizer.ggml.pre: the pre-tokenizers of tokenizer.json, its normalizer, and ignore_merges (a word that
# is a token needs no merges). The first name with a value is the one that is written.
PRE = {
    "gpt-2": ([byte_level(True)], None, False),
    "smollm": ([DIGITS, byte_level(True)], None, False),
    "llama-bpe": ([split(GPT4 % "{1,3}"), byte_level()], None, True),
    "dbrx": ([split(GPT4 % "{1,3}"), byte_level()], None, False),
    "qwen2": ([split(GPT4 % ""), byte_level()], NFC, False),
    "stablelm2": ([split(GPT4 % ""), byte_level()], None, False),
    "olmo": ([byte_level(True)], NFC, False),
    "tekken": ([split(words("", "")), byte_level()], None, True),
    "gpt-4o": ([split(words(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "{1,3}")), byte_level()], None, False),
    "deepseek-coder": (CODER, None, False),
    "deepseek-v3": (
        [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK_V3), byte_level()],
        None,
        False,
    ),
}
PRE |= dict.fromkeys(("phi-2", "mpt", "jais", "gigachat"), PRE["gpt-2"])
PRE |= dict.fromkeys(("starcoder", "refact", "codeshell"), PRE["smollm"])
PRE |= dict.fromkeys(("llama3", "llama-v3", "falcon3"), PRE["llama-bpe"])
PRE |= dict.fromkeys(("deepseek-r1-qwen", "megrez", "hunyuan"), PRE["qwen2"])
ADD_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # unless add_bos_token says otherwise

SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
SPECIAL |= {"sep": "seperator_token_id", "mask": "mask_token_id"}  # the first is spelt so
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # tokens that end an answer
SPACE = "▁"


def read(file: GGUFFile, folder: Path) -> dict:
    """Writes tokenizer.json and the files beside it; returns what config.json says about special tokens."""
    get, path = (
        (lambda key, default=None: file.metadata.get(f"tokenizer.ggml.{key}", default)),
        shown(file.path),
    )
    model, tokens = get("model"), get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{path} has no tokenizer: tokenizer.ggml.tokens is missing or damaged")
    kinds = get("token_type", [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise UserError(f"{path} is damaged: tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")
    if model == "rwkv":
        tokenizer_json.of_characters(characters(file, tokens)).save(str(folder / "tokenizer.json"))
        return {"bos_token_id": None, "eos_token_id": None}
    if model not in ("gpt2", "llama"):
        raise UserError(f"{path} has tokenizer.ggml.model = {model!r}; supported are gpt2, llama and rwkv")
    n_rows = file.tensors["token_embd.weight"].shape[0]
    if len(tokens) > n_rows:
        raise UserError(f"{path} has {len(tokens):,} tokens, but token_embd.weight has only {n_rows:,} rows")
    used = {i: token for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    vocab = {token: i for i, token in used.items()}
    if len(vocab) != len(used):
        twice = next(token for i, token in used.items() if vocab[token] != i)
        raise UserError(f"{path} has two tokens {twice!r}: tokenizer.json cannot represent that")
    described = byte_level_bpe(file, vocab) if model == "gpt2" else sentencepiece(file, vocab, kinds)
    named = {}
    for name, key in SPECIAL.items():
        number = get(key)
        if number is not None and (type(number) is not int or number not in used):
            raise UserError(f"{path} has tokenizer.ggml.{key} = {number!r}, but {len(tokens):,} tokens")
        if number is not None:
            named[name] = number
    special = {named[name] for name in named} | {i for i in used if kinds[i] in (CONTROL, UNKNOWN)}
    described["added_tokens"] = [
        {"id": i, "content": used[i], "special": i in special}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i in sorted(special | {i for i in used if kinds[i] == USER_DEFINED})
    ]
    add_bos = get("add_bos_token", model == "llama" or get("pre") in ADD_BOS)
    before = ["bos"] if add_bos and "bos" in named else []
    after = ["eos"] if get("add_eos_token", False) and "eos" in named else []
    if before or after:
        described["post_processor"] = around(
            [used[named[name]] for name in before], [used[named[name]] for name in after], vocab
        )
    (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": used[number] for name, number in named.items()},
    }
    write_json(folder / "tokenizer_config.json", config)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    ends = [get(key) for key in ENDS if type(get(key)) is int and get(key) in used]
    ids = {f"{name}_token_id": named.get(name) for name in ("bos", "eos", "pad")}
    if len(set(ends)) > 1:
        write_json(folder / "generation_config.json", ids | {"eos_token_id": list(dict.fromkeys(ends))})
    return ids


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def around(before: list[str], after: list[str], vocab: dict[str, int]) -> dict:
    """A post-processor in tokenizer.json that puts special tokens around every text."""

    def listed(tokens: list[str], sequence: str) -> list[dict]:
        return [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]

    single = [*listed(before, "A"), {"Sequence": {"id": "A", "type_id": 0}}, *listed(after, "A")]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in (*before, *after)}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def bpe(vocab: dict[str, int], merges: list[list[str]], **options) -> dict:
    """A tokenizer.json with a BPE model."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model | options | {"vocab": vocab, "merges": merges},
    }


def byte_level_bpe(file: GGUFFile, vocab: dict[str, int]) -> dict:
    """The tokenizer.json for tokenizer.ggml.model = gpt2."""
    pre, merges = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("pre", "merges"))
    if pre not in PRE:
        has = f"has tokenizer.ggml.pre = {pre!r}" if pre else "has no tokenizer.ggml.pre"
        raise UserError(
            f"{shown(file.path)} {has}: how that tokenizer splits a text is not known\n"
            f"supported are {', '.join(PRE)}"
        )
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise UserError(
            f"{shown(file.path)} is damaged: tokenizer.ggml.merges is missing or not a list of texts"
        )
    pairs = []
    for merge in merges:
        left, _, right = (merge[:1] + merge[1:].replace(" ", "\n", 1)).partition("\n")
        if not {left, right, left + right} <= vocab.keys():
            raise UserError(f"{shown(file.path)} is damaged: it has the merge {merge!r}, but not its tokens")
        pairs.append([left, right])
    steps, normalizer, ignore_merges = PRE[pre]
    described = bpe(vocab, pairs, ignore_merges=ignore_merges)
    described["normalizer"] = normalizer
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
    described["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    return described


def sentencepiece(file: GGUFFile, vocab: dict[str, int], kinds: list[int]) -> dict:
    """The tokenizer.json for tokenizer.ggml.model = llama: the pair with the best score is merged first."""
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(kinds):
        raise UserError(f"{shown(file.path)} is damaged: tokenizer.ggml.scores does not fit its tokens")
    texts = {token: i for token, i in vocab.items() if kinds[i] in (NORMAL, UNUSED)}
    unknown = next((token for token, i in vocab.items() if kinds[i] == UNKNOWN), None)
    described = bpe(
        vocab, merges_by_score(texts, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    described["normalizer"] = spaces(prefix)
    described["decoder"] = spaces_back(prefix)
    return described


def spaces(prefix: bool) -> dict:
    """SentencePiece's normalizer: a space is written ▁, and one comes before every text if prefix."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not prefix:
        return replace
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}


def spaces_back(prefix: bool) -> dict:
    """The decoder that goes with `spaces`."""
    steps = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {"type": "Sequence", "decoders": steps}


def merges_by_score(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """All ways to join two tokens into a third, the third with the best score first."""
    merges = []
    for token, number in vocab.items():
        ways = [(token[:i], token[i:]) for i in range(1, len(token))]
        ways = [way for way in ways if way[0] in vocab and way[1] in vocab]
        ways.sort(key=lambda way: (vocab[way[0]], vocab[way[1]]))
        merges += [(-scores[number], left, right) for left, right in ways]
    merges.sort(key=lambda merge: merge[0])
    return [[left, right] for _, left, right in merges]


def characters(file: GGUFFile, tokens: list[str]) -> str:
    """Our character tokenizer's vocabulary. UserError if a token is not one character, or out of order."""
    found = []
    for token in tokens:
        try:
            text = unescaped(token).decode("utf-8", "surrogatepass")
        except ValueError:
            text = ""
        if len(text) != 1:
            raise UserError(
                f"{shown(file.path)} has a tokenizer of RWKV with the token {token!r}\n"
                "only one with one character a token can be represented"
            )
        found.append(text)
    if found != sorted(set(found)):
        raise UserError(f"{shown(file.path)} has characters that are not in the order of their code points")
    return "".join(found)


def escaped(character: str) -> str:
    r"""A token of RWKV's vocabulary: bytes outside of printable ASCII are \xNN."""
    return "".join(
        chr(byte) if 33 <= byte < 127 and byte != ord("\\") else f"\\x{byte:02x}"
        for byte in character.encode("utf-8", "surrogatepass")
    )


def unescaped(token: str) -> bytes:
    r"""The bytes of a token of RWKV's vocabulary, with \xNN, \n, \t, \r and \\ in it, or ValueError."""
    escapes = {"t": b"\t", "n": b"\n", "r": b"\r"}
    parts = re.findall(r"\\x[0-9a-fA-F]{2}|\\[^x]|[^\\]", token, re.DOTALL)
    if "".join(parts) != token:
        raise ValueError(token)
    return b"".join(
        bytes.fromhex(part[2:])
        if part.startswith("\\x")
        else escapes.get(part[1:], part[-1:].encode())
        if part[0] == "\\"
        else part.encode()
        for part in parts
    )


def to_metadata(run: Path, meta: dict) -> dict:
    """The metadata tokenizer.* for a run's tokenizer. UserError for one that llama.cpp does not have."""
    if meta["tokenizer"] == "char":
        tokens = [escaped(character) for character in CharTokenizer(meta["characters"]).characters]
        return prefixed({"model": "rwkv", "tokens": tokens, "token_type": [NORMAL] * len(tokens)})
    imported = (run / "tokenizer.json").exists()
    tokenizer = library_tokenizer(run) if imported else tokenizer_json.of_gpt2()
    described = json.loads(tokenizer.to_str())  # with defaults filled in
    model, added = described["model"], {token["id"]: token for token in described["added_tokens"]}
    for token in added.values():
        flags = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if flags:
            print(f"left out: {' and '.join(flags)} of the token {token['content']!r}", file=sys.stderr)
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or not model["merges"] or any(model[name] for name in affixes):
        kind = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
        raise UserError(f"llama.cpp has no counterpart of the run's tokenizer, {json.dumps(kind)}")
    texts = {i: token for token, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(max(texts) + 1)]
    kinds = [kind_of(i, texts, added, model) for i in range(len(tokens))]
    result = {"model": "gpt2", "tokens": tokens, "token_type": kinds}
    if uses_bytes(described):
        result["pre"] = pre_of(described)
        result["merges"] = [" ".join(pair) for pair in model["merges"]]
        result["add_space_prefix"] = False
    else:
        result |= {"model": "llama", "scores": scores_of(described, kinds)}
        result |= {"pre": "default", "add_space_prefix": has_space_prefix(described)}
    named = special_ids(run, tokenizer) if imported else {"bos": 50256, "eos": 50256}
    result |= added_around(tokenizer, named)
    result |= {SPECIAL[name]: i for name, i in named.items()}
    ends = sorted(end_tokens(run, meta, from_meta(meta, run)), key=lambda i: (i != named.get("eos"), i))
    result |= dict(zip(ENDS, ends, strict=False))
    if len(ends) > len(ENDS):
        names = ", ".join(tokens[i] for i in ends[len(ENDS) :])
        print(f"left out: GGUF has no place for more end-of-text tokens than three: {names}", file=sys.stderr)
    if "eos_token_id" not in result:
        first = tokens[2 if result["model"] == "llama" else 11]
        print(
            f"the tokenizer has no end-of-text token: llama.cpp takes {first!r} for one without --ignore-eos",
            file=sys.stderr,
        )
    template = chat_template(run)
    return prefixed(result) | ({"tokenizer.chat_template": template} if template else {})


def prefixed(values: dict) -> dict:
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def kind_of(number: int, texts: dict[int, str], added: dict[int, dict], model: dict) -> int:
    """The type of a token in GGUF."""
    if number not in texts:
        return UNUSED
    if texts[number] == model["unk_token"] and model["byte_fallback"]:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    if model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", texts[number]):
        return BYTE
    return NORMAL


def steps_of(part: dict | None, name: str) -> list[dict]:
    """The steps of a pre-tokenizer, normalizer or decoder, in their order."""
    if part and part["type"] == "Sequence":
        return part[name]
    return [part] if part else []


def uses_bytes(described: dict) -> bool:
    """Whether a tokenizer.json writes bytes as characters, as GPT-2's does."""
    return any(step["type"] == "ByteLevel" for step in steps_of(described["pre_tokenizer"], "pretokenizers"))


def pre_of(described: dict) -> str:
    """tokenizer.ggml.pre for a byte-level tokenizer.json. UserError if no name stands for its rules."""

    def plain(steps: list[dict]) -> str:
        steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
        # DeepSeek's patterns have the characters \r and \n, others have the escapes.
        return json.dumps(steps, ensure_ascii=False).replace(r"\\r", r"\r").replace(r"\\n", r"\n")

    steps = plain(steps_of(described["pre_tokenizer"], "pretokenizers"))
    normalizer, ignore_merges = described["normalizer"], described["model"]["ignore_merges"]
    for name, (known, known_normalizer, known_ignore) in PRE.items():
        if (plain(known), known_normalizer, known_ignore) == (steps, normalizer, ignore_merges):
            return name
    raise UserError(
        "llama.cpp has no name (tokenizer.ggml.pre) that we know for how the run's tokenizer splits a text: "
        f"pre_tokenizer {steps}, normalizer {json.dumps(normalizer)}, "
        f"ignore_merges {json.dumps(ignore_merges)}"
    )


def has_space_prefix(described: dict) -> bool:
    """Whether a SentencePiece tokenizer.json puts a space before every text; UserError if it is no such."""
    normalizer, splitter = described["normalizer"], described["pre_tokenizer"]
    if described["model"]["byte_fallback"]:
        for prefix in (True, False):
            if (normalizer, splitter) == (spaces(prefix), None):
                return prefix
        if normalizer is None and splitter in [metaspace(scheme) for scheme in ("first", "always", "never")]:
            if splitter["prepend_scheme"] == "first":
                print("llama.cpp also puts a space before a text after a special token", file=sys.stderr)
            return splitter["prepend_scheme"] != "never"
    raise UserError(
        "llama.cpp has no counterpart of the run's tokenizer: "
        f"normalizer {json.dumps(normalizer, ensure_ascii=False)}, "
        f"pre_tokenizer {json.dumps(splitter, ensure_ascii=False)}"
    )


def metaspace(scheme: str) -> dict:
    """The newer form of `spaces`, a pre-tokenizer; scheme: which parts of a text get a space."""
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


def scores_of(described: dict, kinds: list[int]) -> list[float]:
    """A score for each token, so that merging by score is merging by the merges of tokenizer.json."""
    vocab, merges = described["model"]["vocab"], described["model"]["merges"]
    scores = [0.0] * len(kinds)
    for rank, (left, right) in reversed(list(enumerate(merges))):
        scores[vocab[left + right]] = -1.0 - rank
    texts = {token: i for token, i in vocab.items() if kinds[i] == NORMAL}
    for i in texts.values():
        scores[i] = scores[i] or -1.0 - len(merges)
    found = merges_by_score(texts, scores)
    if sorted(map(tuple, found)) != sorted(map(tuple, merges)) or joined(found) != joined(merges):
        raise UserError(
            "llama.cpp has no counterpart of the run's tokenizer: its merges are not ordered by token, as "
            "SentencePiece's are"
        )
    return scores


def joined(merges: list[list[str]]) -> list[str]:
    """The tokens that the merges make, in their order."""
    return ["".join(pair) for pair in merges]


def special_ids(run: Path, tokenizer) -> dict[str, int]:
    """The ids of bos, eos and the like: from tokenizer_config.json, or else config.json."""
    config, imported = read_object(run / "tokenizer_config.json"), read_object(run / HF_CONFIG)
    config = read_object(run / "special_tokens_map.json") | config
    found = {}
    for name in SPECIAL:
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if token else None
        if number is None:
            number = imported.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
        if type(number) is int and tokenizer.id_to_token(number) is not None:
            found[name] = number
    return found


def added_around(tokenizer, named: dict[str, int]) -> dict:
    """add_bos_token and add_eos_token. UserError if other tokens are put around every text.

    Adds a token to `named` if tokenizer.json has it around every text and no file names it.
    """
    example = tokenizer.encode("a")
    mask = [*example.special_tokens_mask, 0]
    before = example.ids[: mask.index(0)]
    after = example.ids[len(mask) - 1 - mask[-2::-1].index(0) :] if 0 in mask[:-1] else []
    for name, ids in (("bos", before), ("eos", after)):
        if len(ids) == 1:
            named.setdefault(name, ids[0])
        if ids not in ([], [named.get(name)]):
            texts = [tokenizer.id_to_token(i) for i in ids]
            raise UserError(f"the run's tokenizer puts {' '.join(texts)} around every text; llama.cpp cannot")
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def chat_template(run: Path) -> str | None:
    """The run's chat template, from the file of its own or from tokenizer_config.json."""
    if (run / "chat_template.jinja").exists():
        return (run / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_object(run / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several with names
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    return template
