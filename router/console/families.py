"""Families of models: those of one are prompted alike. What is said of each stands in
templates/guidelines.html.
"""

from __future__ import annotations

import re

FAMILIES = {
    "SmolLM": r"smol-?lm",
    "Code Llama": r"code-?llama",
    "Llama": r"llama",
    "Mixtral and Mistral": r"mixtral|mistral|codestral|ministral",
    "Qwen": r"qwen|qwq",
    "Gemma": r"gemma",
    "Phi": r"\bphi\b",
    "DeepSeek": r"deepseek",
    "Yi": r"\byi\b",
    "GPT": r"gpt|\bo[134]\b|openai|davinci",
    "Echo": r"\becho\b",
}
"""By the name of each what the names of its models have in them, in small letters; special ones first."""

GENERAL = "Any model"
"""The family of all others."""


def family(*names: str) -> str:
    """The family of a model with these names."""
    words = " ".join(names).lower()
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, words)), GENERAL)
