"""Request bodies of the simulated engine's five interfaces, parsed and checked."""

from __future__ import annotations

import base64
import json
import struct
import time
from typing import Any, Final, NamedTuple

import msgspec

from controlplane.engines.simulated.batching import GenerationRequest
from controlplane.engines.simulated.engine import SimulatedSettings
from controlplane.engines.simulated.script import (
    Script,
    UnusableSchema,
    conversation_of,
    output_request,
    script,
)
from controlplane.engines.simulated.scripted_formats import (
    ScriptedChat,
    ScriptedMessages,
    ScriptedResponses,
)
from controlplane.engines.simulated.text import ANSWER, encode, vector
from controlplane.engines.simulated.wire_formats import (
    ChatFormat,
    CompletionFormat,
    MessagesFormat,
    ResponsesFormat,
    WireFormat,
)

_decode: Final = msgspec.json.Decoder().decode
_SCRIPTED: Final = frozenset({"tools", "response_format", "text", "output_config", "output_format"})
"""Members whose requests may get a scripted response."""


class InvalidRequest(Exception):
    """The request is invalid; the engine responds with an OpenAI-shaped error of this status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class ParsedRequest(NamedTuple):
    """A generating request: what to generate and how to write the response."""

    generation: GenerationRequest
    wire_format: WireFormat
    stream: bool


def parse(path: str, body: bytes, model: str, ident: str, settings: SimulatedSettings) -> ParsedRequest:
    """Parse a generating request.

    Raises InvalidRequest, with 404 for an unknown path or model and 400 for a bad body.
    """
    fields = _fields(body, model)
    created = int(time.time())
    stream = fields.get("stream") is True
    token_ids = fields.get("return_token_ids") is True
    options = fields.get("stream_options")
    include_usage = isinstance(options, dict) and options.get("include_usage") is True
    if fields.get("n", 1) not in (1, None):
        raise InvalidRequest("the simulated engine generates one choice per request: n must be 1")
    scripted = _script(path, fields) if _SCRIPTED & fields.keys() else None
    wire_format: WireFormat
    if path == "/v1/chat/completions":
        ids = [*encode(_conversation(fields.get("messages"))), ANSWER]
        limit = fields.get("max_completion_tokens", fields.get("max_tokens"))
        if scripted is not None:
            wire_format = ScriptedChat(
                ident, model, created, ids, script=scripted, include_usage=include_usage
            )
        else:
            wire_format = ChatFormat(
                ident, model, created, ids, token_ids=token_ids, include_usage=include_usage
            )
    elif path == "/v1/completions":
        ids = _prompt_ids(fields.get("prompt"))
        limit = fields.get("max_tokens", 16)
        wire_format = CompletionFormat(
            ident, model, created, ids, token_ids=token_ids, include_usage=include_usage
        )
    elif path == "/v1/responses":
        ids = [*encode(_responses_input(fields)), ANSWER]
        limit = fields.get("max_output_tokens")
        if scripted is not None:
            wire_format = ScriptedResponses(
                ident, model, created, ids, request_fields=fields, script=scripted
            )
        else:
            wire_format = ResponsesFormat(ident, model, created, ids, request_fields=fields)
    elif path == "/v1/messages":
        ids = _messages_ids(fields)
        limit = fields.get("max_tokens")
        if scripted is not None:
            wire_format = ScriptedMessages(ident, model, created, ids, script=scripted)
        else:
            wire_format = MessagesFormat(ident, model, created, ids)
    else:
        raise InvalidRequest(f"no route {path}", 404)
    if len(ids) >= settings.max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens, the model takes under {settings.max_model_len}"
        )
    generation = GenerationRequest(
        prompt_ids=ids,
        max_tokens=_integer(limit, "max_tokens", at_least=1),
        min_tokens=_integer(fields.get("min_tokens"), "min_tokens") or 0,
        ignore_eos=fields.get("ignore_eos") is True,
        stop=_stop(fields.get("stop", fields.get("stop_sequences"))),
        script=() if scripted is None else _texts(scripted),
    )
    return ParsedRequest(generation, wire_format, stream)


def token_count(body: bytes, model: str) -> bytes:
    """The response body of ``/v1/messages/count_tokens``; raises InvalidRequest."""
    return json.dumps({"input_tokens": len(_messages_ids(_fields(body, model)))}).encode()


def _messages_ids(fields: dict[str, Any]) -> list[int]:
    """The prompt of a request to ``/v1/messages``."""
    system = f"system: {_text(fields['system'])}\n" if fields.get("system") else ""
    return [*encode(system + _conversation(fields.get("messages"))), ANSWER]


def _script(path: str, fields: dict[str, Any]) -> Script | None:
    """The response to a request with tools or a schema, if it is not made-up words."""
    if path == "/v1/completions":
        return None
    try:
        return script(output_request(path, fields), conversation_of(path, fields))
    except UnusableSchema as error:
        raise InvalidRequest(str(error)) from None


def _texts(scripted: Script) -> tuple[bytes, ...]:
    return tuple(json.dumps(piece)[1:-1].encode() for piece in scripted.pieces)


def embeddings(body: bytes, model: str, settings: SimulatedSettings) -> bytes:
    """The response body of ``/v1/embeddings``; raises InvalidRequest."""
    fields = _fields(body, model)
    inputs = fields.get("input")
    if isinstance(inputs, str) or (isinstance(inputs, list) and inputs and isinstance(inputs[0], int)):
        inputs = [inputs]
    if not isinstance(inputs, list) or not inputs:
        raise InvalidRequest("'input' must be a text, a list of texts or lists of token ids")
    prompts = [encode(item) if isinstance(item, str) else _ids(item) for item in inputs]
    size = _integer(fields.get("dimensions"), "dimensions", at_least=1) or settings.embedding_dimensions
    as_base64 = fields.get("encoding_format") == "base64"
    data: list[dict[str, Any]] = []
    for index, ids in enumerate(prompts):
        numbers = vector(ids, size)
        value = base64.b64encode(struct.pack(f"<{size}f", *numbers)).decode() if as_base64 else numbers
        data.append({"object": "embedding", "index": index, "embedding": value})
    count = sum(len(ids) for ids in prompts)
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json.dumps({"object": "list", "data": data, "model": model, "usage": usage}).encode()


def _fields(body: bytes, model: str) -> dict[str, Any]:
    try:
        fields = _decode(body)
    except RecursionError:
        raise InvalidRequest("the body is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        fields = _decode_leniently(body)
    if not isinstance(fields, dict):
        raise InvalidRequest("the body must be a JSON object")
    requested = fields.get("model", model)
    if requested != model:
        raise InvalidRequest(f"The model `{requested}` does not exist. Valid aliases: {model}.", 404)
    return fields


def _decode_leniently(body: bytes) -> Any:
    """Decodes JSON that the strict decoder rejects but vLLM accepts, such as half of a surrogate pair."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def _prompt_ids(prompt: Any) -> list[int]:
    """The ids of a prompt: a text is followed by the mark for generated text, a list of ids is used
    unchanged."""
    if isinstance(prompt, str):
        return [*encode(prompt), ANSWER]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        return _prompt_ids(prompt[0])
    return _ids(prompt)


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not value:
        raise InvalidRequest("'prompt' must be one text or one list of token ids")
    for item in value:
        if type(item) is not int or item < 0:
            raise InvalidRequest("'prompt' must be one text or one list of token ids")
    return value


def _conversation(messages: Any) -> str:
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("'messages' must be a list with at least one message")
    parts: list[str] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequest("each message must be an object with a 'role'")
        parts.append(f"{message['role']}: {_text(message.get('content'))}\n")
    return "".join(parts)


def _responses_input(fields: dict[str, Any]) -> str:
    value = fields.get("input")
    if isinstance(value, str):
        text = f"user: {value}\n"
    elif isinstance(value, list):
        text = "".join(
            f"{item.get('role', item.get('type', 'item'))}: {_text(item.get('content', item))}\n"
            for item in value
            if isinstance(item, dict)
        )
    else:
        raise InvalidRequest("'input' must be a text or a list of items")
    instructions = fields.get("instructions")
    return f"system: {instructions}\n{text}" if instructions else text


def _text(content: Any) -> str:
    """The text of a message's content, which may be a list of parts; other content is written as JSON."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(
            part["text"] if isinstance(part, dict) and isinstance(part.get("text"), str) else json.dumps(part)
            for part in content
        )
    return json.dumps(content, sort_keys=True)


def _integer(value: Any, name: str, at_least: int = 0) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value < at_least:
        raise InvalidRequest(f"'{name}' must be a whole number of at least {at_least}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise InvalidRequest("'stop' must be a text or a list of texts")
    return tuple(items)
