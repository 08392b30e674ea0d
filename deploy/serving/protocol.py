"""What clients may ask for: the fields of OpenAI's API that the server implements, and those that it refuses.

A field that is not implemented is an error that names it, unless it has the value that changes nothing.
"""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.serving.sampling import MOST_LENGTH_PENALTY, NOT_FOR_BEAMS

MOST_STOPS = 16
MOST_LOGPROBS = 20
# Fields that OpenAI documents and this server does not implement, with the values that change nothing. None,
# which clients send for "not given", is always one of them.
NOT_IMPLEMENTED = {
    "audio": [],
    "echo": [False],
    "function_call": ["none"],
    "functions": [[]],
    "logits_processors": [[]],
    "metadata": [{}],
    "modalities": [["text"]],
    "moderation": [],
    "parallel_tool_calls": [],
    "prediction": [],
    "prompt_cache_key": [],
    "prompt_cache_retention": [],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "safety_identifier": [],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none"],
    "tools": [[]],
    "user": [],
    "verbosity": [],
    "web_search_options": [],
}


class Refused(ValueError):
    """A request that the server does not answer: status 400, with the name of the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class Strict(BaseModel):
    """JSON values must have the right type: "5" is not a number. A field of another name is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False
    """Sends the numbers of tokens in a last chunk."""
    include_obfuscation: Literal[False] = False


class Common(Strict):
    """The fields of both kinds of completions. Those from top_k on are not OpenAI's; vLLM has them too."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    use_beam_search: bool | None = None
    """Searches with as many beams as best_of says, or n if it is not given."""
    length_penalty: Annotated[float, Field(ge=-MOST_LENGTH_PENALTY, le=MOST_LENGTH_PENALTY)] | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_by_name(cls, fields):
        """Refuses fields that are not implemented, and drops those whose value changes nothing."""
        if not isinstance(fields, dict):
            return fields
        kept = {}
        for name, value in fields.items():
            if name in cls.model_fields or name not in NOT_IMPLEMENTED:
                kept[name] = value
            elif value is not None and value not in NOT_IMPLEMENTED[name]:
                shown = json.dumps(value)
                shown = f" ({shown})" if len(shown) <= 40 else ""
                raise Refused(f"the field {name!r}{shown} is not implemented: leave it out", name)
        return kept

    @model_validator(mode="after")
    def check_combinations(self):
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options is only for stream = true", "stream_options")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise Refused(f"best_of ({self.best_of}) is less than n ({self.n or 1})", "best_of")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise Refused("with best_of, the texts are chosen at the end: leave stream out", "best_of")
        if "" in self.stops:
            raise Refused("a stop string is empty", "stop")
        if self.use_beam_search:
            self.check_beams()
        elif self.length_penalty not in (None, 1):
            raise Refused("length_penalty is only for use_beam_search = true", "length_penalty")
        return self

    def check_beams(self):
        if self.texts == 1:
            raise Refused("use_beam_search needs two beams or more: set best_of (or n)", "use_beam_search")
        if self.stream:
            raise Refused("with use_beam_search, the texts are chosen at the end: leave stream out", "stream")
        for name, neutral in NOT_FOR_BEAMS.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise Refused(f"{name} = {json.dumps(value)} is not for beam search: leave it out", name)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def texts(self) -> int:
        """How many texts are generated for each prompt, those that are not returned included."""
        return max(self.n or 1, self.best_of or 1)


Tokens = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(Common):
    prompt: str | Tokens | Annotated[list[str] | list[Tokens], Field(min_length=1)]
    """A text, its tokens, or a list of either."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    """How many of the most likely tokens to list at each position."""


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, fields):
        """Drops fields that are null, such as tool_calls in an answer that openai's client returned."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None or name == "content"}

    def plain(self) -> dict[str, str]:
        """As chat templates expect it."""
        content = self.content
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def check_pairs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs is only for logprobs = true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Refused("give max_tokens or max_completion_tokens, not both", "max_tokens")
        return self


class TokenizeRequest(Strict):
    """Either a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def check_one(self):
        if (self.prompt is None) == (self.messages is None):
            raise Refused("give either prompt or messages", "prompt")
        return self
