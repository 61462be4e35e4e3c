"""The official openai SDK."""

from typing import Any

import openai


def sdk(url: str, key: str = "none", **options: Any) -> openai.OpenAI:
    """A client for a server, which tries everything once."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, **options)
