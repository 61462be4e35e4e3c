"""Exports Banded's metrics under vLLM's names too, for dashboards that query those."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

# Banded's metric families and vLLM's names for them.
VLLM = {
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "kv_usage_ratio": "kv_cache_usage_perc",
    "prompt_tokens": "prompt_tokens",
    "generated_tokens": "generation_tokens",
    "requests": "request_success",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "draft_tokens": "spec_decode_num_draft_tokens",
    "accepted_draft_tokens": "spec_decode_num_accepted_tokens",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "e2e_time_seconds": "e2e_request_latency_seconds",
    "queue_time_seconds": "request_queue_time_seconds",
    "prefill_time_seconds": "request_prefill_time_seconds",
    "decode_time_seconds": "request_decode_time_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generated_tokens": "request_generation_tokens",
}
# vLLM counts requests under these reasons only; it has no outcome "rejected".
FINISHED_REASONS = ("stop", "length", "abort", "error")


class VllmNames(Collector):
    """The families of a registry. A family that vLLM has too is followed by its copy with vLLM's name and labels.

    Nothing is counted twice: a scrape reads both names from one counter.
    """

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            yield family
            name = VLLM.get(family.name.removeprefix("banded_"))
            if name is not None:
                alias = Metric(f"vllm:{name}", family.documentation, family.type)
                alias.samples = list(renamed(family, alias.name))
                yield alias


def renamed(family: Metric, name: str) -> Iterator[Sample]:
    samples = family.samples
    if name == "vllm:kv_cache_usage_perc":  # vLLM has one pool; the fullest of ours decides what fits
        samples = [max(samples, key=lambda sample: sample.value)] if samples else []
    for sample in samples:
        labels = {"model_name": sample.labels["model"], "engine": "0"}
        if "le" in sample.labels:
            labels["le"] = sample.labels["le"]
        if "outcome" in sample.labels:
            labels["finished_reason"] = sample.labels["outcome"]
        if labels.get("finished_reason", "stop") in FINISHED_REASONS:
            yield Sample(name + sample.name.removeprefix(family.name), labels, sample.value)
