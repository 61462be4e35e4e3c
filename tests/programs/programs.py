"""The programs that `make clients` runs: what each is installed from, and the script that uses it."""

from typing import NamedTuple


class Program(NamedTuple):
    """A program. Its packages are installed in their newest versions, where they don't say which."""

    name: str
    script: str = ""  # of scripts/
    pip: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    debian: tuple[str, ...] = ()  # PROGRAM=PACKAGE
    not_run: str = ""  # why it can't be run

    @property
    def folder(self) -> str:
        """Of its environment."""
        return "".join(char if char.isalnum() or char in ".-" else "-" for char in self.name.lower())


PROGRAMS = [
    Program("openai for Python", "openai_sdk.py", pip=("openai",)),
    Program("openai 1.13 for Python", "openai_sdk.py", pip=("openai==1.13.*", "httpx<0.28")),
    Program("openai 0.28 for Python", "openai_028.py", pip=("openai==0.28.*",)),
    Program("LiteLLM", "litellm_library.py", pip=("litellm",)),
    Program("LiteLLM proxy", "litellm_proxy.py", pip=("litellm[proxy]",)),
    Program("langchain-openai", "langchain_models.py", pip=("langchain-openai",)),
    Program("LlamaIndex", "llamaindex_models.py", pip=("llama-index-llms-openai-like",)),
    Program("llm", "llm_cli.py", pip=("llm",)),
    Program("DSPy", "dspy_lm.py", pip=("dspy",)),
    Program("Inspect", "inspect_eval.py", pip=("inspect-ai", "openai")),
    Program("Open WebUI", "open_webui.py", pip=("torch==2.13.0", "open-webui", "playwright"), debian=("chromium=chromium",)),
    Program("openai for Node", "openai_sdk.mjs", npm=("openai",)),
    Program("AI SDK", "ai_sdk.mjs", npm=("ai", "@ai-sdk/openai", "@ai-sdk/openai-compatible")),
    Program("promptfoo", "promptfoo_eval.mjs", npm=("promptfoo",)),
    Program("curl", "curl.py", debian=("curl=curl",)),
    Program("JDK HttpClient", "jdk.py", debian=("java=default-jdk-headless",)),
    Program("nginx", "nginx.py", debian=("nginx=nginx-light",)),
    Program("HAProxy", "haproxy.py", debian=("haproxy=haproxy",)),
    Program("Caddy", "caddy.py", debian=("caddy=caddy",)),
    Program("vllm-router", "router.py", pip=("vllm-router",)),
    Program("sglang-router", "router.py", pip=("sglang-router",)),
    Program("GuideLLM", "guidellm_benchmark.py", pip=("torch==2.13.0", "guidellm")),
    Program("aiperf", "aiperf_profile.py", pip=("aiperf",)),
    Program("vllm bench serve", "vllm_bench_requests.py"),
    Program("mikupad", "mikupad_requests.py"),
    Program("LibreChat", not_run="in no registry; tests/clients/test_front_ends.py sends the bodies that it sends"),
]
