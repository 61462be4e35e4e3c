"""All Prometheus metrics of the server, in a registry of their own."""

import math
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

M = TypeVar("M")

# The *_created series are of no use here and double the page.
disable_created_metrics()

# The low end tells a 1 ms token from a 2 ms one.
TOKEN_SECONDS = (0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.008, 0.016, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 5)
REQUEST_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
OUTCOMES = ("stop", "length", "abort", "error", "rejected")


class Metrics:
    """The series of one served model, each labelled with its name."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        self._model = model
        self.ready = self._gauge("ready", "1 while requests may be sent here")
        self.requests_running = self._gauge("requests_running", "Choices that hold a slot")
        self.requests_waiting = self._gauge("requests_waiting", "Choices that wait for a slot")
        self.put_back = self._counter("put_back", "Times that a choice gave its slot to another client, to go on later")
        self.queue_limit = self._gauge("queue_limit", "Choices that may wait before a request is refused")
        self.kv_held = self._family(Gauge, "kv_pages_held", "KV pages in use", "group")
        self.kv_total = self._family(Gauge, "kv_pages", "KV pages of the pool", "group")
        self.kv_usage = self._family(Gauge, "kv_usage_ratio", "Share of the KV pages in use, 0 to 1", "group")
        self.prefix_cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self.prefix_cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self.draft_tokens = self._counter("draft_tokens", "Tokens computed ahead on a guess")
        self.accepted_draft_tokens = self._counter("accepted_draft_tokens", "Guesses that came true")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to a choice's first token", REQUEST_SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two steps that brought a choice tokens", TOKEN_SECONDS
        )
        self.time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between two tokens of a choice", TOKEN_SECONDS
        )
        self.queue_time = self._histogram("queue_time_seconds", "From submission to a slot", REQUEST_SECONDS)
        self.prefill_time = self._histogram("prefill_time_seconds", "From a slot to the first token", REQUEST_SECONDS)
        self.decode_time = self._histogram("decode_time_seconds", "From the first token to the last", REQUEST_SECONDS)
        self.end_to_end_time = self._histogram("e2e_time_seconds", "From submission to the end", REQUEST_SECONDS)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of the requests that were accepted")
        self.generated_tokens = self._counter("generated_tokens", "Tokens sampled for clients")
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of a prompt, once for all its choices", TOKEN_COUNTS
        )
        self.request_generated_tokens = self._histogram(
            "request_generated_tokens", "Tokens generated for a choice", TOKEN_COUNTS
        )
        self.step_time = self._histogram("step_time_seconds", "One engine step", TOKEN_SECONDS)
        self.step_tokens = self._histogram("step_tokens", "Tokens computed in one engine step", TOKEN_COUNTS)
        self.outcome = self._family(Counter, "requests", "Choices by how they ended", "outcome")  # one of OUTCOMES
        self.http_responses = self._family(Counter, "http_requests", "HTTP responses", "route", "status")
        self.connections = self._gauge("connections", "Open HTTP connections")
        self.event_loop_lag = self._gauge("event_loop_lag_seconds", "Longest delay of the event loop in half a minute")
        self.stream_errors = self._counter("stream_errors", "Streams that failed after their first byte, under status 200")
        self.non_finite_logits = self._counter("non_finite_logits", "Requests ended by logits that were NaN or infinite")
        self.load_time = self._gauge("load_seconds", "Time it took to load the weights")
        # By kind of model.doctor.KernelErrors; without samples if nothing was measured.
        about = "Largest difference of a logit by these kernels from the reference, as measured at start"
        self.kernel_logit_error = self._family(Gauge, "kernel_logit_error", about, "kind")
        self.data_free_bytes = self._gauge("data_free_bytes", "Bytes free for the data directory, NaN without one")
        self.data_free_bytes.set(math.nan)
        self.accounting_faults = self._counter("page_accounting_faults", "Faults found by the KV accounting's self-check")
        for outcome in OUTCOMES:
            self.outcome(outcome)  # a counter that appears with its first event hides that event from rate()
        Info("banded_build", "Versions", registry=self.registry).info(
            {"banded": version("banded"), "torch": version("torch")}
        )

    def _family(self, kind: Callable[..., M], name: str, about: str, *labels: str, **options: Any) -> Callable[..., M]:
        """A function from the values of `labels` to the metric's series."""
        family: Any = kind(f"banded_{name}", about, ["model", *labels], registry=self.registry, **options)
        return partial(family.labels, self._model)

    def _gauge(self, name: str, about: str) -> Gauge:
        return self._family(Gauge, name, about)()

    def _counter(self, name: str, about: str) -> Counter:
        return self._family(Counter, name, about)()

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return self._family(Histogram, name, about, buckets=buckets)()
