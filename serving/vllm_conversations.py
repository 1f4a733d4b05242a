"""Chats with more in them than text: tools, a form of the answer, reasoning, words for the chat template.

All of it is vLLM's: its own request type, made from ours, goes through its own renderer and parsers.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any, cast

from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.parser import Parser as VllmParser
from vllm.renderers import BaseRenderer, TokenizeParams
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.renderers.hf import safe_apply_chat_template
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import StructuredOutputsParams

from serving.engine import Prompt, Refusal
from serving.messages import Chat, Message, NamedTool, ResponseFormat, Tool
from serving.settings import EngineSettings
from serving.vllm_grammars import Grammars
from serving.vllm_parsing import ChoiceParser, new_decoder
from serving.vllm_requests import COUNTED_CONTEXTS, Rendered, prompt_refusal


class CountedRequest(ChatCompletionRequest):
    """vLLM's, but that its prompt is counted past the context."""

    def build_tok_params(self, model_config: ModelConfig) -> TokenizeParams:
        counted = COUNTED_CONTEXTS * model_config.max_model_len
        return dataclasses.replace(super().build_tok_params(model_config), max_total_tokens=counted)


class ConversationRenderer:
    """Any chat to prompt tokens, a constraint and a parser."""

    def __init__(
        self, config: VllmConfig, renderer: BaseRenderer[Any], settings: EngineSettings, grammars: Grammars
    ) -> None:
        """Raises TypeError for a parser that vLLM has not, or that cannot do with the model's tokenizer."""
        self._model = config.model_config
        self._renderer = renderer
        self._grammars = grammars
        self._online = OnlineRenderer(
            config.model_config,
            renderer,
            request_logger=None,
            chat_template=None,
            chat_template_content_format="auto",
            enable_auto_tools=settings.tool_parser is not None,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
        )
        parser = self._online.parser
        self._finds_tools = parser is not None and parser.tool_parser_cls is not None
        self.finds_reasoning = parser is not None and (
            parser.reasoning_parser_cls is not None or parser.always_adjust_request
        )
        """Whether every answer of the model has to be parsed."""
        self._arguments = _arguments_of_rendering(renderer)

    async def render(self, chat: Chat) -> Prompt:
        """Raises Refusal."""
        request = self._request(chat)
        constraint = _constraint(request)
        if constraint is not None:
            # Before vLLM looks at it, who has all the time in the world.
            await self._grammars.check(constraint, "response_format")
        content = await asyncio.to_thread(self._rendered, request)
        tokens: list[int] = content["prompt_token_ids"]
        constraint = _constraint(request)
        constrained_by = None
        if constraint is not None:
            # A call that must be made wins over a form of the text.
            constrained_by = (
                "tools" if _forced(chat) or request.response_format is None else "response_format"
            )
            await self._grammars.check(constraint, constrained_by)
        rendered = Rendered(
            content,
            {
                "structured_outputs": constraint,
                "skip_special_tokens": request.skip_special_tokens,
                "spaces_between_special_tokens": request.spaces_between_special_tokens,
            },
            {} if constraint is None else self._reasoning(request, tokens),
            constrained_by,
        )
        if not self._is_parsed(request):
            return Prompt(len(tokens), rendered)
        return Prompt(
            len(tokens),
            rendered,
            parser=lambda: ChoiceParser(self._new_parser(request), request, tokens),
            decoder=lambda: new_decoder(self._renderer.get_tokenizer(), request, tokens),
        )

    def _request(self, chat: Chat) -> CountedRequest:
        calls = bool(chat.tools) and chat.tool_choice != "none"
        if calls and not self._finds_tools:
            raise Refusal(
                'tools: this model has no tool parser configured, so it cannot call any; "none" is the only'
                " tool_choice that it takes",
                param="tools",
            )
        words = _template_words(chat.chat_template_kwargs)
        if taken := sorted(self._arguments & words.keys()):
            raise Refusal(
                f"chat_template_kwargs: {taken[0]!r} is not for a request to set",
                param="chat_template_kwargs",
            )
        return CountedRequest.model_validate(_said(chat, words))

    def _rendered(self, request: CountedRequest) -> Any:
        """What vLLM makes of the request, which the parser adjusts on the way. As it may make a grammar for
        that, it runs in a thread, on an event loop of its own."""
        try:
            result = asyncio.run(self._online.render_chat(request))
        except VLLMValidationError as error:
            raise prompt_refusal(error, self._model.max_model_len, "messages") from error
        except ChatTemplateResolutionError as error:
            raise Refusal("model: it has no chat template, so it cannot chat", param="model") from error
        if isinstance(result, ErrorResponse):
            raise Refusal(result.error.message, param=result.error.param)
        return result[1][0]

    def _reasoning(self, request: CountedRequest, tokens: list[int]) -> dict[str, Any]:
        parser = self._new_parser(request) if self._online.parser is not None else None
        ended = {"reasoning_ended": request.resolve_reasoning_ended(parser, tokens)}
        if parser is None or parser.reasoning_parser is None:
            return ended
        words = self._online.effective_chat_template_kwargs(request)
        return ended | {"reasoning_parser_kwargs": {"chat_template_kwargs": words}}

    def _is_parsed(self, request: CountedRequest) -> bool:
        calls = self._finds_tools and bool(request.tools) and request.tool_choice != "none"
        return self.finds_reasoning or calls

    def _new_parser(self, request: CountedRequest) -> VllmParser:
        assert self._online.parser is not None  # noqa: S101 - asked for only where there is one
        return self._online.parser(
            self._renderer.get_tokenizer(),
            cast("Any", request.tools),
            chat_template_kwargs=self._online.effective_chat_template_kwargs(request),
            model_config=self._model,
        )


def _arguments_of_rendering(renderer: BaseRenderer[Any]) -> frozenset[str]:
    """What a request must not say to the chat template: it would say it to the functions that render."""
    functions: tuple[Callable[..., Any], ...] = (
        safe_apply_chat_template,
        renderer.get_tokenizer().apply_chat_template,
    )
    names = {name for function in functions for name in inspect.signature(function).parameters}
    return frozenset(names - {"documents", "kwargs"})


def _template_words(words: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {} if words is None else json.loads(words)
    return said


def _constraint(request: CountedRequest) -> StructuredOutputsParams | None:
    """What holds the answer, its schema as JSON: as an object it could not cross to the engine with all the
    numbers that JSON has."""
    constraint = request.extract_structured_outputs()
    if constraint is None or not isinstance(constraint.json, dict):
        return constraint
    return dataclasses.replace(constraint, json=json.dumps(constraint.json))


# ---- our request as vLLM's --------------------------------------------------------------------------------


def _said(chat: Chat, words: dict[str, Any]) -> dict[str, Any]:
    request: dict[str, Any] = {
        "messages": [_message(message) for message in chat.messages],
        "stream": chat.stream,
        "parallel_tool_calls": chat.parallel_tool_calls,
        "reasoning_effort": chat.reasoning_effort,
        "chat_template_kwargs": words,
        "response_format": _response_format(chat.response_format),
    }
    if not chat.tools:
        return request
    choice: Any = chat.tool_choice
    if isinstance(choice, NamedTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    tools = [_tool(tool, strict=_forced(chat)) for tool in chat.tools]
    return request | {"tools": tools, "tool_choice": choice}


def _forced(chat: Chat) -> bool:
    """Whether the answer has to be a call."""
    return bool(chat.tools) and chat.tool_choice not in {"none", "auto"}


def _message(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning": message.reasoning,
    }
    said = {key: value for key, value in said.items() if value is not None}
    if message.tool_calls:
        said["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    return said | {"role": message.role, "content": message.content}


def _tool(tool: Tool, *, strict: bool) -> dict[str, Any]:
    """`strict`: its arguments are held to its schema unless the request says otherwise."""
    function: dict[str, Any] = {
        "name": tool.name,
        "description": tool.description,
        "parameters": None if tool.parameters is None else json.loads(tool.parameters),
        "strict": tool.strict if tool.strict is not None else strict or None,
    }
    return {
        "type": "function",
        "function": {key: value for key, value in function.items() if value is not None},
    }


def _response_format(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.schema is None:
        return {"type": "json_object"}
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": json.loads(wanted.schema)},
    }
