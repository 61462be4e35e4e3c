"""All Prometheus metrics of the server, in a registry of their own."""

from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, disable_created_metrics

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
        self.queue_limit = self._gauge("queue_limit", "Choices that may wait before a request is refused")
        self._kv_held = Gauge("banded_kv_pages_held", "KV pages in use", ["model", "group"], registry=self.registry)
        self._kv_total = Gauge("banded_kv_pages", "KV pages of the pool", ["model", "group"], registry=self.registry)
        self._kv_usage = Gauge(
            "banded_kv_usage_ratio", "Share of the KV pages in use, 0 to 1", ["model", "group"], registry=self.registry
        )
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
        self._outcomes = Counter(
            "banded_requests", "Choices by how they ended", ["model", "outcome"], registry=self.registry
        )
        self._http = Counter("banded_http_requests", "HTTP responses", ["model", "route", "status"], registry=self.registry)
        self.stream_errors = self._counter("stream_errors", "Streams that failed after their first byte, under status 200")
        self.load_time = self._gauge("load_seconds", "Time it took to load the weights")
        self._logit_error = Gauge(
            "banded_kernel_logit_error",
            "Largest difference of a logit by these kernels from the reference, as measured at start",
            ["model", "kind"],
            registry=self.registry,
        )
        self.accounting_faults = self._counter("page_accounting_faults", "Faults found by the KV accounting's self-check")
        for outcome in OUTCOMES:
            self.outcome(outcome)  # a counter that appears with its first event hides that event from rate()
        Info("banded_build", "Versions", registry=self.registry).info(
            {"banded": version("banded"), "torch": version("torch")}
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"banded_{name}", text, ["model"], registry=self.registry).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"banded_{name}", text, ["model"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"banded_{name}", text, ["model"], registry=self.registry, buckets=buckets).labels(self._model)

    def kv_held(self, group: str) -> Gauge:
        return self._kv_held.labels(self._model, group)

    def kv_total(self, group: str) -> Gauge:
        return self._kv_total.labels(self._model, group)

    def kv_usage(self, group: str) -> Gauge:
        return self._kv_usage.labels(self._model, group)

    def kernel_logit_error(self, kind: str) -> Gauge:
        """For a kind of model.doctor.KernelErrors; without samples if nothing was measured."""
        return self._logit_error.labels(self._model, kind)

    def outcome(self, outcome: str) -> Counter:
        """Counter of choices that ended in one of OUTCOMES."""
        return self._outcomes.labels(self._model, outcome)

    def http_response(self, route: str, status: int) -> Counter:
        return self._http.labels(self._model, route, str(status))
