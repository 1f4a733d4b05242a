from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.utils.chat_template_utils import render_jinja_template
from vllm.config import VllmConfig
from vllm.renderers import BaseRenderer, renderer_from_config

from serving.messages import Message
from serving.settings import EngineSettings
from serving.vllm_engine import configuration
from serving.vllm_rendering import PlainRenderer
from serving.vllm_shortcut import LONGEST, Pieces, Shortcut, renderer_of
from tests.serving.replayed import SMOLLM2

MARKS = ("<|im_start|>", "<|im_end|>", "<s>")

WORDS = ("a ", " b", "rail", "way", "\n", "\n\n", "  ", "é", "🚂", "\uff46", "12345", "<", "|im_", "'s", "")

texts = st.lists(st.sampled_from((*MARKS, *WORDS)) | st.text(max_size=6), max_size=12).map("".join)

conversations = st.lists(
    st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=texts),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    """SmolLM2, as vLLM is told of it."""
    return configuration(EngineSettings(engine="vllm", source=SMOLLM2))


@pytest.fixture(scope="module")
def renderer(config: VllmConfig) -> Iterator[BaseRenderer[Any]]:
    """What vLLM renders with."""
    renderer = renderer_from_config(config)
    yield renderer
    renderer.shutdown()


@pytest.fixture(scope="module")
def shortcut(config: VllmConfig, renderer: BaseRenderer[Any]) -> Shortcut:
    """That of SmolLM2."""
    shortcut = Shortcut.of(config.model_config, renderer)
    assert shortcut is not None
    return shortcut


@pytest.fixture(scope="module")
def plain(config: VllmConfig, renderer: BaseRenderer[Any]) -> PlainRenderer:
    """What decides whether the shortcut is taken."""
    return PlainRenderer(config, renderer)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(messages=conversations)
def test_it_finds_what_vllm_finds(
    shortcut: Shortcut, plain: PlainRenderer, renderer: BaseRenderer[Any], messages: list[Message]
) -> None:
    """Text and tokens of any plain conversation are those of vLLM's renderer, special tokens in what was said
    included, whether its pieces have been seen before or not."""
    told: Any = [{"role": message.role, "content": message.content} for message in messages]
    _, (theirs,) = renderer.render_chat([told], plain.template, renderer.default_chat_tok_params)
    for _ in range(2):
        assert shortcut.render(messages) == (theirs["prompt"], theirs["prompt_token_ids"])


@pytest.mark.parametrize(
    "message",
    [Message(role="user", content="a" * (LONGEST + 1)), Message(role="developer", content="Be brief.")],
    ids=["long", "another role"],
)
def test_other_conversations_are_left_to_vllm(
    shortcut: Shortcut, plain: PlainRenderer, message: Message
) -> None:
    """A conversation that is long, or has a role that not every template knows, is rendered by vLLM."""
    assert shortcut.render([message]) is None
    prompt = asyncio.run(plain.chat([message]))
    assert prompt.length > 0


TEMPLATES = {
    "what transformers adds": "{{ strftime_now('%Y') }}{% generation %}{{ messages | tojson }}"
    "{% endgeneration %}",
    "what jinja adds": "{% set all = namespace(n=0) %}{% for m in messages %}{% if loop.last %}{% break %}"
    "{% endif %}{% set all.n = all.n + 1 %}{% endfor %}{{ all.n }}{{ range(3) | list }}"
    "{{ lipsum is defined }}",
    "what is told": "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "what is not told": "{{ enable_thinking is defined }}{{ other }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_has_it(name: str) -> None:
    """A template finds the same under every name, however often it is asked."""
    template = TEMPLATES[name]
    told: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "<s>"}
    messages = [{"role": "user", "content": "<&>"}, {"role": "assistant", "content": "é"}]
    theirs: Any = render_jinja_template([messages], chat_template=template, **told)
    render = renderer_of(template)
    for _ in range(2):
        assert render(told | {"tools": None, "documents": None}, messages=messages) == theirs[0][0]


def test_a_template_that_refuses_does_so_each_time() -> None:
    """What a template raises comes out of it, and the next conversation is rendered all the same."""
    render = renderer_of("{% if messages %}{{ raise_exception('no') }}{% endif %}fine")
    with pytest.raises(TemplateError, match="no"):
        render(messages=[{}])
    assert render(messages=[]) == "fine"


def trained(pre_tokenizer: Any, **mark: bool) -> Tokenizer:
    """A small tokenizer that is cut this way first, with marks of that kind."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS) * 3, "railway a b c d e f 1 2"], trainer)
    tokenizer.add_special_tokens([AddedToken(content, **mark) for content in MARKS])
    return tokenizer


TOKENIZERS = {
    "bytes": trained(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "bytes after a space": trained(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "words": trained(pre_tokenizers.Whitespace()),
    "a mark before the first word": trained(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a mark before each word": trained(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "marks that take the space before": trained(
        pre_tokenizers.Metaspace(prepend_scheme="never"), lstrip=True
    ),
    "marks that take the space after": trained(pre_tokenizers.ByteLevel(), rstrip=True),
    "marks that are whole words": trained(pre_tokenizers.ByteLevel(), single_word=True),
}


@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=texts)
def test_pieces_are_the_whole(name: str, text: str) -> None:
    """Whatever a tokenizer does to a text, by pieces or not, the tokens are those of the whole text."""
    tokenizer = TOKENIZERS[name]
    assert Pieces.encoder(tokenizer)(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_pieces_are_used_where_they_may_be() -> None:
    """A tokenizer whose pieces stand for themselves is used by pieces, one that looks around is not."""
    by_pieces = {
        name: hasattr(Pieces.encoder(tokenizer), "__self__") for name, tokenizer in TOKENIZERS.items()
    }
    assert by_pieces["bytes"]
    assert not by_pieces["a mark before the first word"]
    assert not by_pieces["marks that take the space before"]
    assert not by_pieces["marks that take the space after"]
