"""What the server does under load, as Markdown from the committed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load() -> str:
    """Return the figures of closed and open loops with images."""
    found = json.loads((RESULTS / "serving_load.json").read_text())
    lines = [
        (
            "| clients | tokens/s with drafts | without | ratio | time per token: ratio"
            " | TTFT p50, p99 in ms | ITL p50, p99 in ms |"
        ),
        f"|---:|{'---:|' * 6}",
    ]
    for clients, row in found["closed_loop"].items():
        on, off = row["on"], row["off"]
        lines.append(
            f"| {clients} | {on['tokens_per_second']:.0f} | {off['tokens_per_second']:.0f} |"
            f" {row['throughput_on_over_off']:.2f}x | {row['tpot_off_over_on']:.2f}x |"
            f" {_tail(on['ttft_ms'])} | {_tail(on['itl_ms'])} |"
        )
    loops = "; ".join(
        f"{row['rate']:.1f} requests a second at random: TTFT {_tail(row['on']['ttft_ms'])} ms with"
        f" drafts, {_tail(row['off']['ttft_ms'])} without"
        for row in found["open_loop"].values()
    )
    machine, replies = found["hardware"], found["replies"]
    lines += [
        "",
        (
            "The example model, a new image in each request, clients that ask again once they are"
            " answered; medians of rounds in turns, tails with drafts. Eight clients get"
            f" {found['throughput_over_one_after_the_other']:.2f} times the throughput of one after"
            f" the other, and {found['throughput_over_ordinary_one_after_the_other']:.2f} times"
            f" that of one without drafts. In open loops, {loops}. Of {replies['compared']:,}"
            f" replies, {replies['different']} differ from the one that ordinary decoding gives the"
            f" request alone, and {replies['failed']} failed. float32, {machine['threads']} thread"
            f" of {machine['processor']}, the clients on the other core."
        ),
    ]
    return "\n".join(lines)


def peers() -> str:
    """Return the figures beside other servers."""
    found = json.loads((RESULTS / "serving_peers.json").read_text())
    servers = found["servers"]
    clients = list(next(iter(servers.values()))["clients"])
    lines = [
        f"| tokens/s (time per token in ms) | {' | '.join(f'{n} clients' for n in clients)} |",
        f"|---|{'---:|' * len(clients)}",
    ]
    for name, row in servers.items():
        cells = " | ".join(
            f"{one['tokens_per_second']:.0f} ({one['tpot_p50_ms']:.1f})"
            for one in row["clients"].values()
        )
        lines.append(f"| {name} | {cells} |")
    same = ", ".join(
        f"{name} {row['replies_as_ours']}"
        for name, row in servers.items()
        if not name.startswith("fastvlm")
    )
    failed = {
        name: sum(one["failed_requests"] for one in row["clients"].values())
        for name, row in servers.items()
    }
    lost = "; ".join(f"{name} failed {count} requests" for name, count in failed.items() if count)
    machine = found["hardware"]
    lines += [
        "",
        (
            "The same decoder, prompts of text, float32 and"
            f" {found['threads']} threads of {machine['processor']} for all, measured by vLLM's own"
            f" `vllm bench serve`. Replies that equal ours, of {found['prompts']}: {same}."
            f"{' ' + lost[0].upper() + lost[1:] + '.' if lost else ''}"
        ),
    ]
    return "\n".join(lines)


def _tail(times: dict[str, Any]) -> str:
    return f"{times['p50']:.0f}, {times['p99']:.0f}"
