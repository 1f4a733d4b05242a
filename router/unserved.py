"""Parameters that clients of OpenAI's API or vLLM's know, that would change the answer, and that are not
served: to ignore them would be to answer another question. What nobody knows is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.errors import InvalidRequest, shown

Neutral = tuple[Any, ...]
"""The values, beside null, with which the answer is the same."""

_UNSERVED: dict[str, Neutral] = {
    "use_beam_search": (False,),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}

UNSERVED_IN_CHAT: dict[str, Neutral] = _UNSERVED | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "include_reasoning": (True,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
}
"""At the top of a chat completion request."""

UNSERVED_IN_MESSAGES: dict[str, Neutral] = {
    "function_call": (),
    "audio": (),
    "refusal": (),
}
"""In each of its messages."""

UNSERVED_IN_TEXT: dict[str, Neutral] = _UNSERVED | {
    "suffix": ("",),
    "max_completion_tokens": (),
    "response_format": ({"type": "text"},),
    "prompt_embeds": (),
}
"""At the top of a text completion request."""


def refuse_unserved(fields: Mapping[str, Any], unserved: Mapping[str, Neutral], prefix: str = "") -> None:
    """Raises InvalidRequest for the first of the fields that is in the table and not neutral. `prefix` is
    the path to them."""
    for name, value in fields.items():
        neutral = unserved.get(name)
        if neutral is None or value is None or any(_is(value, each) for each in neutral):
            continue
        allowed = " or ".join(["left out", "null", *map(shown, neutral)])
        raise InvalidRequest(
            f"{prefix}{name} is not supported: it must be {allowed}, not {shown(value)}",
            param=prefix + name,
            code="unsupported_parameter",
        )


def refuse_unserved_in_messages(messages: Any) -> None:
    """The same for each of the messages, whatever they are."""
    for position, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict) and not UNSERVED_IN_MESSAGES.keys().isdisjoint(message):
            refuse_unserved(message, UNSERVED_IN_MESSAGES, f"messages[{position}].")


def _is(value: Any, neutral: Any) -> bool:
    """Whether they are the same in JSON, where 0 is not false."""
    return type(value) is type(neutral) and bool(value == neutral)
