"""OpenAI's own client, and a question whose answer the small models know."""

from __future__ import annotations

from typing import Any

from openai import DefaultHttpxClient, OpenAI

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
FACT = "The capital of France is Paris."
"""What the bundled SmolLM2 135M answers at temperature 0."""


def client(url: str) -> OpenAI:
    """For the gateway at ``url``; its httpx client is closed with it."""
    return OpenAI(base_url=f"{url}/v1", api_key="not-needed", max_retries=0, http_client=DefaultHttpxClient())
