"""vLLM's series next to Banded's own: names, labels, types and values."""

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.api.metrics_alias import VLLM, VllmNames
from service.engine.metrics import Metrics
from tests.conformance import contract

# Names and types that dashboards for vLLM query.
GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
COUNTERS = {
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
}

Labels = tuple[tuple[str, str], ...]


def exported(metrics: Metrics) -> dict[str, dict[Labels, float]]:
    """The vLLM samples of a served page by name and labels, without the two labels that all have."""
    page = generate_latest(VllmNames(metrics.registry)).decode()
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                labels = dict(sample.labels)
                assert (labels.pop("model_name"), labels.pop("engine")) == ("small", "0")
                found.setdefault(sample.name.removeprefix("vllm:"), {})[tuple(sorted(labels.items()))] = sample.value
    return found


def used() -> Metrics:
    """Metrics in which every family has counted something."""
    metrics = Metrics("small")
    metrics.kv_usage("dense").set(0.25)
    metrics.kv_usage("banded").set(0.75)
    metrics.requests_running.set(3)
    metrics.prompt_tokens.inc(7)
    metrics.generated_tokens.inc(5)
    metrics.prefix_cache_queries.inc(4)
    metrics.prefix_cache_hits.inc(2)
    metrics.draft_tokens.inc(8)
    metrics.accepted_draft_tokens.inc(6)
    metrics.outcome("stop").inc()
    metrics.outcome("abort").inc(2)
    metrics.outcome("rejected").inc(9)
    metrics.time_per_output_token.observe(0.0012)
    return metrics


@contract("metrics", "--metrics-alias vllm", "every series of the list, with vLLM's labels")
def test_every_series_is_there_under_its_type() -> None:
    samples = exported(used())
    histograms = {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
    assert set(samples) == GAUGES | COUNTERS | histograms
    page = generate_latest(VllmNames(used().registry)).decode()
    for kind, names in (("gauge", GAUGES), ("counter", COUNTERS), ("histogram", HISTOGRAMS)):
        for name in names:
            assert f"# TYPE vllm:{name} {kind}\n" in page
    assert len(VLLM) == len(GAUGES | COUNTERS | HISTOGRAMS)


@contract("metrics", "--metrics-alias vllm", "values are those of banded's own")
def test_values_are_those_of_banded() -> None:
    metrics = used()
    samples = exported(metrics)
    assert samples["num_requests_running"] == {(): 3}
    assert samples["kv_cache_usage_perc"] == {(): 0.75}
    assert samples["prompt_tokens_total"] == {(): 7}
    assert samples["generation_tokens_total"] == {(): 5}
    assert samples["prefix_cache_queries_total"] == {(): 4}
    assert samples["prefix_cache_hits_total"] == {(): 2}
    assert samples["spec_decode_num_draft_tokens_total"] == {(): 8}
    assert samples["spec_decode_num_accepted_tokens_total"] == {(): 6}
    reasons = {"stop": 1, "length": 0, "abort": 2, "error": 0}
    assert samples["request_success_total"] == {(("finished_reason", reason),): n for reason, n in reasons.items()}
    metrics.prompt_tokens.inc()
    assert exported(metrics)["prompt_tokens_total"] == {(): 8}  # read when scraped


def test_histograms_keep_their_buckets() -> None:
    metrics = used()
    buckets = exported(metrics)["request_time_per_output_token_seconds_bucket"]
    own = {
        (("le", sample.labels["le"]),): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "banded_request_time_per_output_token_seconds_bucket"
    }
    assert buckets == own
    assert buckets[(("le", "0.001"),)] == 0
    assert buckets[(("le", "0.0015"),)] == 1
    assert exported(metrics)["request_time_per_output_token_seconds_count"] == {(): 1}


def test_banded_names_stay() -> None:
    metrics = used()
    with_alias = generate_latest(VllmNames(metrics.registry)).decode().splitlines()
    assert [line for line in with_alias if "vllm:" not in line] == generate_latest(metrics.registry).decode().splitlines()


def test_before_the_first_request() -> None:
    samples = exported(Metrics("small"))
    assert samples["request_success_total"][(("finished_reason", "stop"),)] == 0
    assert "kv_cache_usage_perc" not in samples  # no engine yet
