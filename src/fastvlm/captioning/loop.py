"""Asking about the images of many parts, in one continuous batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from fastvlm.captioning.files import PartFiles
from fastvlm.captioning.template import PromptTemplate
from fastvlm.data.conversations import Broken
from fastvlm.data.image_records import ImagePart, ImageRecord
from fastvlm.decoding import Request, Strategy
from fastvlm.functional.ahead import ahead
from fastvlm.functional.errors import FastVlmError, InputError, first_line, is_out_of_memory
from fastvlm.functional.noise import MAX_SEED
from fastvlm.request_builder import PlannedRequest
from fastvlm.vision.loading import load_image
from fastvlm.vlm import VisionLanguageModel

SEED_STRIDE = 2**32
"""The distance between the seeds of two parts: more than a part has images."""

NumberedPart = tuple[int, ImagePart]


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of each image.

    Args:
        template: The prompt.
        options: How replies are decoded, see `VisionLanguageModel.request`.
        copied: Fields of the images' rows that are copied to the output.
    """

    template: PromptTemplate
    options: Mapping[str, Any] = field(default_factory=dict)
    copied: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Return what the replies depend on, in plain types."""
        options = dict(self.options)
        form = options.pop("structured", None)
        return {
            "prompt": self.template.text,
            "structured": None if form is None else [form.kind, form.value],
            **options,
        }

    def options_for(self, part: int, index: int) -> dict[str, Any]:
        """Return the options of an image's request; sampled replies have a seed of their own."""
        seed = self.options.get("seed")
        if seed is None:
            return dict(self.options)
        return {**self.options, "seed": (seed + part * SEED_STRIDE + index) % MAX_SEED}


@dataclass(frozen=True, slots=True)
class PartResult:
    """A part that is finished.

    Args:
        number: Its number.
        images: Its images.
        failed: Those of them without a caption, and why.
        tokens: Tokens of its captions.
    """

    number: int
    images: int
    failed: tuple[Broken, ...]
    tokens: int


@dataclass(slots=True)
class _PartAtWork:
    """A part whose images are asked about: what is known of each, in order."""

    number: int
    rows: list[Mapping[str, Any] | Broken | None] = field(default_factory=list)
    missing: int = 0
    whole: bool = False
    """Whether all of its images have been read."""

    @property
    def finished(self) -> bool:
        return self.whole and not self.missing


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request's place, and what its row begins with."""

    part: _PartAtWork
    index: int
    row: Mapping[str, Any]


def caption_parts(
    vlm: VisionLanguageModel,
    parts: Iterable[NumberedPart],
    question: Question,
    files: PartFiles,
    *,
    strategy: Strategy | None = None,
    image_threads: int = 1,
) -> Generator[PartResult]:
    """Ask about the images of parts, write each part when it is finished, and yield it.

    The images of the next part enter the engine's batch as slots become free, so that it is always
    full. They are decoded in threads ahead of that.

    Args:
        vlm: The model.
        parts: The parts with their numbers, read as images are needed.
        question: What is asked.
        files: Where the parts are written.
        strategy: How drafts are made; None for the model's default.
        image_threads: Threads that decode images.

    Raises:
        InputError: A part can't be read, or an option is out of range.
        StorageError: A part can't be written.
        Exception: The memory is short. Whatever else an image's request fails with is the image's
            failure.
    """
    asked: dict[Request, _Asked] = {}
    at_work: list[_PartAtWork] = []
    ahead_of_requests: deque[_Asked] = deque()

    def planned() -> Iterator[PlannedRequest]:
        for number, part in parts:
            work = _PartAtWork(number)
            at_work.append(work)
            with closing(ahead(_opened, part.read(), image_threads)) as records:
                for record in records:
                    index = len(work.rows)
                    work.rows.append(record if isinstance(record, Broken) else None)
                    if isinstance(record, Broken):
                        continue
                    try:
                        prompt = question.template.of({"name": record.name, **record.fields})
                    except InputError as error:
                        work.rows[index] = _failure(record.name, error)
                        continue
                    row: dict[str, Any] = {"image": record.name, "prompt": prompt}
                    row |= {name: record.fields.get(name) for name in question.copied}
                    ahead_of_requests.append(_Asked(work, index, row))
                    work.missing += 1
                    options = question.options_for(number, index)
                    yield vlm.planned_request(prompt, record.image, strategy=strategy, **options)
            work.whole = True

    def requests() -> Iterator[Request]:
        # A request is built beside the next ones, for their images to be encoded together.
        for request in vlm.builder.all(planned()):
            asked[request] = ahead_of_requests.popleft()
            yield request

    with closing(vlm.engine.run(requests())) as replies:
        for request in replies:
            place = asked.pop(request)
            place.part.rows[place.index] = _row(vlm, request, place.row)
            place.part.missing -= 1
            yield from _written(at_work, files)
    # The last ones may have no image that could be asked about.
    yield from _written(at_work, files)


def _opened(record: ImageRecord | Broken) -> ImageRecord | Broken:
    """Return a record with its image decoded; a broken one if it can't be."""
    if isinstance(record, Broken):
        return record
    try:
        return ImageRecord(record.name, load_image(record.image), record.fields)
    # A Pillow image decodes here too, and raises what its format's decoder raises.
    except (InputError, OSError, SyntaxError, ValueError) as error:
        return Broken(record.name, f"unreadable image: {first_line(error)}")


def _row(
    vlm: VisionLanguageModel, request: Request, known: Mapping[str, Any]
) -> Mapping[str, Any] | Broken:
    """Return an image's row in the output; why there is none, if the request failed.

    Raises:
        Exception: It failed for want of memory.
    """
    error = request.error
    if error is None:
        reply = vlm.reply(request)
        said = {"text": reply.text.strip(), "finish_reason": reply.finish_reason}
        return {**known, **said, "tokens": len(reply.token_ids)}
    return _failure(str(known["image"]), error)


def _failure(name: str, error: Exception) -> Broken:
    """Return why there is no caption.

    Raises:
        Exception: The memory is short, which is no fault of the image.
    """
    if is_out_of_memory(error):
        raise error
    ours = isinstance(error, FastVlmError)
    return Broken(name, str(error) if ours else f"{type(error).__name__}: {first_line(error)}")


def _written(at_work: list[_PartAtWork], files: PartFiles) -> Iterator[PartResult]:
    """Write the parts that are finished, and yield them."""
    for work in [work for work in at_work if work.finished]:
        failed = [row for row in work.rows if isinstance(row, Broken)]
        rows = [row for row in work.rows if row is not None and not isinstance(row, Broken)]
        files.write(work.number, rows, failed)
        at_work.remove(work)
        tokens = sum(row["tokens"] for row in rows)
        yield PartResult(work.number, len(work.rows), tuple(failed), tokens)


@dataclass(frozen=True, slots=True)
class CaptionJob:
    """What a worker needs in order to caption parts; it can be pickled.

    Args:
        load: Loads the model.
        strategy: Returns how drafts are made.
        question: What is asked of each image.
        files: Where the parts are written.
        image_threads: Threads of a worker that decode images.
    """

    load: Callable[[], VisionLanguageModel]
    strategy: Callable[[VisionLanguageModel], Strategy]
    question: Question
    files: PartFiles
    image_threads: int = 1

    def run(self, parts: Iterable[NumberedPart]) -> Generator[PartResult]:
        """Caption parts in this process. See `caption_parts`."""
        vlm = self.load()
        strategy, threads = self.strategy(vlm), self.image_threads
        yield from caption_parts(
            vlm, parts, self.question, self.files, strategy=strategy, image_threads=threads
        )
