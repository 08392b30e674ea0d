"""What /metrics reports, in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The server's own counts, and those of the engine, of which `stats` holds the newest."""

    def __init__(self, stats: dict):
        self.stats = stats
        self.registry = CollectorRegistry()
        counters, times = {"registry": self.registry}, {"registry": self.registry, "buckets": SECONDS}
        self.finished = Counter("serving_finished", "Texts, by how they ended", ["reason"], **counters)
        self.refused = Counter("serving_refused", "Requests refused, by status", ["status"], **counters)
        self.prompt_tokens = Counter("serving_prompt_tokens", "Tokens of prompts", **counters)
        self.generated_tokens = Counter("serving_generated_tokens", "Tokens generated", **counters)
        self.to_first_token = Histogram("serving_time_to_first_token_seconds", "Queueing included", **times)
        self.between_tokens = Histogram("serving_time_between_tokens_seconds", "Of one text", **times)
        self.duration = Histogram("serving_request_seconds", "From arrival to the last token", **times)
        self.registry.register(self)

    def collect(self):
        """Called by the registry: the engine's counts."""
        for name, (kind, text) in ENGINE_STATS.items():
            if name in self.stats:
                yield kind(f"serving_{name}", text, value=self.stats[name])

    def observe_tokens(self, request, index: int, n: int, now: float) -> None:
        """Counts n new tokens of a request's text `index`."""
        self.generated_tokens.inc(n)
        if not request.last_token:
            self.to_first_token.observe(now - request.started)
        if index in request.last_token:
            self.between_tokens.observe((now - request.last_token[index]) / n)
        request.last_token[index] = now

    def text(self) -> bytes:
        return generate_latest(self.registry)


ENGINE_STATS = {
    "running": (GaugeMetricFamily, "Requests in the batch"),
    "waiting": (GaugeMetricFamily, "Requests in the queue"),
    "cache_use": (GaugeMetricFamily, "Share of the cache's blocks that requests hold"),
    "prefix_hits": (CounterMetricFamily, "Prompt tokens that the prefix cache had"),
    "preemptions": (CounterMetricFamily, "Requests that gave up their blocks for others"),
    "drafted": (CounterMetricFamily, "Tokens that the MTP block drafted"),
    "accepted": (CounterMetricFamily, "Drafted tokens that the model accepted"),
}
