"""Chat templates of imported models: how a conversation becomes the text that the model was trained on.

A template is a program in the language Jinja, and may come from anybody: it runs in Jinja's sandbox. It
renders as in transformers (utils/chat_template_utils.py there).
"""

import json
import re
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from data.tokenizers import CHAT_TEMPLATES, NAMED_TOKENS, HuggingFaceTokenizer, read_object
from lab.errors import UserError, shown


class ChatTemplate:
    """The chat template of a run, or of another folder with a tokenizer's files."""

    def __init__(self, folder: Path):
        self._source, source = find(folder)
        self._tokens = special_tokens(folder)
        try:
            self._template = environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self._source} is damaged: line {error.lineno}: {first_line(error)}") from None

    def render(self, messages: list[dict], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, and what comes before an answer.

        messages: [{"role": "system", "user" or "assistant", "content": text}, …]. Raises UserError if the
        template fails, refuses the messages, or does what the sandbox forbids.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        except SecurityError as error:
            raise UserError(f"{self._source} was stopped: it is not safe: {first_line(error)}") from None
        except Refusal as error:
            raise UserError(f"{self._source} refuses the conversation: {first_line(error)}") from None
        except Exception as error:  # a template can raise what any Python expression can
            raise UserError(f"{self._source} fails: {first_line(error)}") from None


class Refusal(jinja2.TemplateError):
    """The error of a template that calls raise_exception."""


def find(folder: Path) -> tuple[str, str]:
    """A name for messages and the text of the default template. Raises UserError if there is none.

    They are in chat_template.jinja and additional_chat_templates/, or in tokenizer_config.json: one, or a
    list of named ones.
    """
    config = read_object(folder / "tokenizer_config.json")
    named = config.get("chat_template")
    source = f"the chat template in {shown(folder / 'tokenizer_config.json')}"
    if isinstance(named, list):
        try:
            named = {each["name"]: each["template"] for each in named}
        except (KeyError, TypeError):
            raise UserError(f"{source} is damaged: a template in the list has no name or no text") from None
    own = folder / "chat_template.jinja"
    paths = {"default": own} if own.is_file() else {}
    paths |= {path.stem: path for path in sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))}
    if paths:  # as in transformers, they replace those in tokenizer_config.json
        named = {name: text_of(path) for name, path in paths.items()}
        source = f"the chat template in {shown(paths.get('default', folder / CHAT_TEMPLATES))}"
    if isinstance(named, dict):
        if named and "default" not in named:
            raise UserError(f"{shown(folder)} has the chat templates {', '.join(named)}, but no default one")
        named = named.get("default")
    if named is None:
        raise UserError(
            f"the tokenizer of {shown(folder)} has no chat template: the model was not made to chat\n"
            "import an instruction-tuned model (often called Instruct or Chat), or leave out --chat"
        )
    if not isinstance(named, str):
        raise UserError(f"{source} is damaged: it is not a text")
    return source, named


def text_of(path: Path) -> str:
    """The text of a template file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {shown(path)}: {first_line(error)}") from None


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token and so on, which templates may use."""
    config = read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # older files
        config = config | read_object(folder / "special_tokens_map.json")
    tokens = {name: config[name] for name in NAMED_TOKENS if config.get(name) is not None}
    return {
        name: token["content"] if isinstance(token, dict) else str(token) for name, token in tokens.items()
    }


def encode(tokenizer, text: str) -> np.ndarray:
    """The ids of rendered text. The template has written all special tokens, so none is added."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja's sandbox with what transformers adds to it. Raises UserError if it is too old to be safe."""
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        raise UserError(
            f"a chat template needs jinja2 3.1.6 or newer, and {version('jinja2')} is installed: templates "
            "could leave its sandbox\npip install -U jinja2"
        )

    def raise_exception(message):
        raise Refusal(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    sandbox.filters["tojson"] = tojson  # Jinja's own escapes HTML
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),  # without the attributes of a class
        "namespace": Namespace,
    }
    return sandbox


class GenerationTag(Extension):
    """{% generation %} … {% endgeneration %}, which marks answers in training data, and changes no text."""

    tags = {"generation"}  # noqa: RUF012  as Jinja defines it

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller):
        return caller()


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, which a template can write to, without names that reach into Python."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: str) -> None:
    """Raises SecurityError for a name with an underscore in front."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
