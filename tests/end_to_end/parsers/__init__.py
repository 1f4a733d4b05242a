from __future__ import annotations

MODELS = {"newer": "qwen3", "older": "deepseek_r1"}
"""Models by name, and how each marks its reasoning: for a parser of vLLM's newer kind, and its older one."""

THOUGHT = "<think>What is asked?</think>"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich 🚆", "days": 3}}\n</tool_call>'
OTHER_CALL = '<tool_call>\n{"name": "get_time", "arguments": {"city": "Rome"}}\n</tool_call>'

ANSWERS = {
    "thinks and says": THOUGHT + "\n\nParis is the capital 🏛 of France.",
    "only thinks": "<think>What is the question",
    "thinks and calls": THOUGHT + "\n\n" + CALL,
    "thinks, says and calls twice": THOUGHT + "Let me see.\n" + CALL + "\n" + OTHER_CALL,
    "calls in broken JSON": THOUGHT
    + '<tool_call>\n{"name": "get_time", "arguments": {"city": \n</tool_call>',
    "thinks twice": THOUGHT + "Paris.</think> And Rome.",
}
"""What the models say, by the seed that is the number of the answer."""

SEEDS = {kind: seed for seed, kind in enumerate(ANSWERS)}
