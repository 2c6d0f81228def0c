"""The items of a response, and the events that tell of them as they come."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from fastvlm.serving.tool_readers import Call, Part
from fastvlm.serving.tools import ToolUse

Event = tuple[str, dict[str, Any]]
"""An event of a stream: its type, and its fields."""


class ResponseItems:
    """The items of one response, whose text comes piece by piece: messages, and calls of functions.

    One is open at a time: text behind a call is a message of its own. A reply without any text is
    an empty message.

    Args:
        tools: What the model may call.
    """

    def __init__(self, tools: ToolUse) -> None:
        self.tools, self.reader = tools, tools.reader()
        self.items: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._drafted: list[bool] = []
        """What is known of tokens whose text has not come."""

    def feed(
        self,
        text: str,
        logprobs: Sequence[dict[str, Any]] = (),
        drafted: Sequence[bool] = (),
    ) -> Iterator[Event]:
        """Yield the events that new text makes.

        Args:
            text: The text.
            logprobs: The log-probabilities of its tokens; none where they aren't asked for.
            drafted: Whether each token was drafted; none where that isn't asked for.
        """
        self._logprobs += logprobs
        self._drafted += drafted
        for part in self.reader.feed(text):
            yield from self._add(part)

    def end(self, status: str) -> Iterator[Event]:
        """Yield the events of the end, as no more text will come.

        Args:
            status: That of the last item.
        """
        for part in self.reader.end():
            yield from self._add(part)
        if not self.items:
            yield from self._open_message()
        if self._logprobs or self._drafted:
            yield self._delta("")
        yield from self._close(status)

    def _add(self, part: Part) -> Iterator[Event]:
        if isinstance(part, Call):
            yield from self._close("completed")
            yield self._open_call(part.name)
            text = part.arguments
        elif isinstance(part, str):
            if not self.items or self.items[-1]["type"] != "message":
                yield from self._close("completed")
                yield from self._open_message()
            text = part
        else:
            text = part.text
        if text:
            yield self._delta(text)

    def _open_message(self) -> Iterator[Event]:
        item = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "status": "in_progress",
            "role": "assistant",
            "content": [],
        }
        yield self._opened(item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield "response.content_part.added", {**self._place, "part": part}
        self.items[-1]["content"] = [part]

    def _open_call(self, name: str) -> Event:
        return self._opened(
            {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": self.tools.call_id(),
                "name": name,
                "arguments": "",
            }
        )

    def _opened(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        return "response.output_item.added", {"output_index": self._last, "item": item}

    def _delta(self, text: str) -> Event:
        """Return the event of further text of the open item."""
        item, logprobs = self.items[-1], self._logprobs
        found: dict[str, Any] = {**self._place, "delta": text}
        if self._drafted:
            found["drafted"] = self._drafted
        self._logprobs, self._drafted = [], []
        if item["type"] == "function_call":
            item["arguments"] += text
            return "response.function_call_arguments.delta", found
        [part] = item["content"]
        part["text"] += text
        part["logprobs"] += logprobs
        return "response.output_text.delta", {**found, "logprobs": logprobs}

    def _close(self, status: str) -> Iterator[Event]:
        """Yield the events of the end of the open item, if there is one."""
        if not self.items:
            return
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            whole = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**self._place, **whole}
        else:
            [part] = item["content"]
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            yield "response.output_text.done", {**self._place, **text}
            yield "response.content_part.done", {**self._place, "part": part}
        yield "response.output_item.done", {"output_index": self._last, "item": item}

    @property
    def _last(self) -> int:
        """The number of the open item."""
        return len(self.items) - 1

    @property
    def _place(self) -> dict[str, Any]:
        """Where the text of the open item stands in the response."""
        item = self.items[-1]
        found = {"item_id": item["id"], "output_index": self._last}
        return found | ({"content_index": 0} if item["type"] == "message" else {})
