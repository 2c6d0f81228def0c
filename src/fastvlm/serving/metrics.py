"""Metrics in Prometheus' format, under the names that vLLM's dashboards know."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastvlm.decoding.request import Request
from fastvlm.drafting.imitation import ImitationNetwork
from fastvlm.serving.engine_thread import EngineThread
from fastvlm.serving.next_draft import draft_label

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
"""Bounds of the histograms of times, in seconds."""
FINISHED_REASONS = {"cancelled": "abort"}
"""Labels of replies that have ended, where vLLM calls a reason otherwise."""


class Metrics:
    """What a server has done.

    Args:
        engine: Whose requests are counted.
        name: The model's name in the API.
    """

    def __init__(self, engine: EngineThread, name: str) -> None:
        self.registry = CollectorRegistry()
        self.name = name

        def counter(metric: str, what: str, *labels: str) -> Counter:
            names = ["model_name", *labels]
            found = Counter(f"vllm:{metric}", what, names, registry=self.registry)
            if not labels:
                # It is 0 from the beginning, so that the first increase is one.
                found.labels(name)
            return found

        def times(metric: str, what: str) -> Histogram:
            found = Histogram(
                f"vllm:{metric}", what, ["model_name"], buckets=SECONDS, registry=self.registry
            )
            found.labels(name)
            return found

        for metric, what, value in (
            ("num_requests_running", "Requests that have a slot.", lambda: engine.running),
            ("num_requests_waiting", "Requests that wait for a slot.", lambda: engine.waiting),
        ):
            gauge = Gauge(f"vllm:{metric}", what, ["model_name"], registry=self.registry)
            gauge.labels(name).set_function(value)
        self.drafts = counter("spec_decode_num_drafts", "Drafts.")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Drafted tokens.")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Accepted tokens.")
        self.accepted_per_position = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by position.", "position"
        )
        self.by_draft = {
            metric: Counter(
                f"fastvlm:{metric}", what, ["model_name", "draft"], registry=self.registry
            )
            for metric, what in (
                ("draft_tokens", "Drafted tokens by draft."),
                ("accepted_tokens", "Accepted tokens by draft."),
            )
        }
        self._labels: WeakKeyDictionary[ImitationNetwork, str] = WeakKeyDictionary()
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens", "Tokens of replies.")
        self.prefix_queries = counter("prefix_cache_queries", "Positions of prompts.")
        self.prefix_hits = counter("prefix_cache_hits", "Positions that were not computed again.")
        self.finished = counter("request_success", "Replies that have ended.", "finished_reason")
        for reason in ("stop", "length", "abort", "error"):
            self.finished.labels(name, reason)
        self.first_token = times("time_to_first_token_seconds", "Time to the first token.")
        self.between_tokens = times("inter_token_latency_seconds", "Time between two tokens.")
        self.whole = times("e2e_request_latency_seconds", "Time of a request.")

    def observe(self, request: Request) -> None:
        """Count a request that has ended."""
        name = self.name
        reason = request.finish_reason or "cancelled"
        self.finished.labels(name, FINISHED_REASONS.get(reason, reason)).inc()
        self.prompt_tokens.labels(name).inc(len(request.prompt_token_ids))
        self.prefix_queries.labels(name).inc(len(request.prompt_token_ids))
        self.prefix_hits.labels(name).inc(request.cached)
        self.generation_tokens.labels(name).inc(len(request.output_token_ids))
        drafted = [proposed for proposed in request.proposed if proposed]
        self.drafts.labels(name).inc(len(drafted))
        self.draft_tokens.labels(name).inc(sum(drafted))
        self.accepted.labels(name).inc(sum(request.accepted))
        network = getattr(request.strategy, "network", None)
        if network is not None:
            if network not in self._labels:
                self._labels[network] = draft_label(network)
            label = self._labels[network]
            self.by_draft["draft_tokens"].labels(name, label).inc(sum(drafted))
            self.by_draft["accepted_tokens"].labels(name, label).inc(sum(request.accepted))
        for position in range(max(request.accepted, default=0)):
            reached = sum(count > position for count in request.accepted)
            self.accepted_per_position.labels(name, str(position)).inc(reached)
        if request.times:
            self.first_token.labels(name).observe(request.times[0] - request.started)
            self.whole.labels(name).observe(request.times[-1] - request.started)
        for before, after in zip(request.times, request.times[1:], strict=False):
            self.between_tokens.labels(name).observe(after - before)

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)
