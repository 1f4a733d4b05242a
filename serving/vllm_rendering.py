"""Requests to prompts: the plain ones here, the others in `serving.vllm_conversations`.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.renderers import BaseRenderer, ChatParams
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.utils.mistral import is_mistral_tokenizer

from serving.engine import Prompt, Refusal
from serving.messages import Chat, Message, Request, Text
from serving.settings import EngineSettings
from serving.vllm_conversations import ConversationRenderer
from serving.vllm_grammars import Grammars
from serving.vllm_requests import COUNTED_CONTEXTS, Rendered, prompt_refusal
from serving.vllm_shortcut import Shortcut, said


class Renderer:
    """Renders for one model. Decides who does."""

    def __init__(
        self, config: VllmConfig, renderer: BaseRenderer[Any], settings: EngineSettings, grammars: Grammars
    ) -> None:
        self._plain = PlainRenderer(config, renderer)
        self._conversations = ConversationRenderer(config, renderer, settings, grammars)

    def warm_up(self) -> None:
        """Compile the chat template, so that the first request does not wait for it."""
        self._plain.warm_up()

    async def render(self, request: Request) -> list[Prompt]:
        """Raises Refusal."""
        if isinstance(request, Text):
            return await self._plain.texts(request)
        if self._conversations.finds_reasoning or not is_plain(request):
            return [await self._conversations.render(request)]
        return [await self._plain.chat(request.messages)]


def is_plain(request: Chat) -> bool:
    """Whether there is nothing to render but who said what."""
    asks = request.tools or request.response_format or request.chat_template_kwargs
    return not (
        asks or request.reasoning_effort is not None or any(map(_is_more_than_said, request.messages))
    )


def _is_more_than_said(message: Message) -> bool:
    return message.role == "tool" or bool(message.tool_calls) or message.reasoning is not None


class PlainRenderer:
    """Texts and plain messages to prompt tokens, the latter under the model's chat template."""

    def __init__(self, config: VllmConfig, renderer: BaseRenderer[Any]) -> None:
        self._renderer = renderer
        self._model = config.model_config
        self._context_length = config.model_config.max_model_len
        # A template gives text, which is then tokenized; Mistral's tokenizers give tokens at once.
        tokenize = is_mistral_tokenizer(renderer.tokenizer)
        self.template = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": tokenize})
        counted = COUNTED_CONTEXTS * self._context_length
        self._chats = dataclasses.replace(renderer.default_chat_tok_params, max_total_tokens=counted)
        self._texts = dataclasses.replace(renderer.default_cmpl_tok_params, max_total_tokens=counted)
        self._shortcut = Shortcut.of(config.model_config, renderer)

    def warm_up(self) -> None:
        """Compile the template."""
        self._renderer.warmup(self.template)

    async def chat(self, messages: Sequence[Message]) -> Prompt:
        """Raises Refusal: the template's, or one for a prompt far longer than the context."""
        rendered = self._shortcut and self._shortcut.render(messages)
        if rendered:
            text, tokens = rendered
            return Prompt(len(tokens), Rendered(tokens_input(tokens, prompt=text)))
        conversation: Any = [said(message) for message in messages]
        try:
            _, (content,) = await self._renderer.render_chat_async([conversation], self.template, self._chats)
        except VLLMValidationError as error:
            raise prompt_refusal(error, self._context_length, "messages") from error
        except ChatTemplateResolutionError as error:
            raise Refusal("model: it has no chat template, so it cannot chat", param="model") from error
        return Prompt(len(content["prompt_token_ids"]), Rendered(content))

    async def texts(self, request: Text) -> list[Prompt]:
        """Raises Refusal for a prompt far longer than the context, or with a token that the vocabulary has
        not."""
        prompts: list[Any] = [
            prompt if isinstance(prompt, str) else list(prompt) for prompt in request.prompts
        ]
        params = dataclasses.replace(self._texts, needs_detokenization=request.echo)
        try:
            for prompt in prompts:
                if not isinstance(prompt, str):
                    self._renderer.validate_token_ids(prompt)
            contents = await self._renderer.render_cmpl_async(
                [parse_model_prompt(self._model, prompt) for prompt in prompts], params
            )
        except VLLMValidationError as error:
            raise prompt_refusal(error, self._context_length, "prompt") from error
        return [_text_prompt(content, echo=request.echo) for content in contents]


def _text_prompt(content: Any, *, echo: bool) -> Prompt:
    return Prompt(
        len(content["prompt_token_ids"]), Rendered(content), content.get("prompt", "") if echo else None
    )
