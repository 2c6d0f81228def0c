"""`fastvlm caption`: a reply about each image of a large collection, resumably."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastvlm.cli.files import check_folder
from fastvlm.cli.generate import DraftOptions, SamplingOptions
from fastvlm.cli.loading import DecodingRuntime, ModelOption, layers_in, usage
from fastvlm.cli.questions import DESCRIPTION_PROMPT, description_prompt
from fastvlm.cli.terminal import PlainConsole
from fastvlm.functional.cores import usable_cores
from fastvlm.functional.errors import InputError
from fastvlm.functional.files import locked
from fastvlm.functional.text_files import read_text

if TYPE_CHECKING:
    from fastvlm.captioning.loop import NumberedPart, PartResult, Question

CORES_OF_WORKER = 8
"""Cores for each worker on a machine without an accelerator, by default."""
MAX_IMAGE_THREADS = 4
"""The most threads of a worker that decode images, unless more are asked for."""


@dataclass(frozen=True, slots=True)
class CollectionOptions:
    """The images."""

    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="The images: a folder, a list (.txt with a path a line, .jsonl with rows), shards"
            " ('DIR/*.tar'), parquet files, a folder that `datasets` saved, or the name of a data"
            " set on the Hugging Face hub.",
        ),
    ]
    split: Annotated[str, typer.Option(metavar="NAME", help="The split of a data set.")] = "train"
    part_size: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=2**31 - 1,
            help="Images of a part, which is done as a whole. Shards, row groups of parquet files"
            " and those of a streamed data set are parts of their own.",
        ),
    ] = 64


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where the captions go."""

    folder: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", help="The folder of the output; a stopped run goes on from there."
        ),
    ]
    format: Annotated[
        Literal["jsonl", "parquet"],
        typer.Option(help="What a part's captions are written as."),
    ] = "jsonl"
    copy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD", help="Copy a field of each image's row to the output; again for more."
        ),
    ] = None
    max_failed: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0,
            max=1,
            help="Images that can't be captioned are listed with the reason in failed.jsonl; more"
            " than this share of all ends the run.",
        ),
    ] = 0.05


@dataclass(frozen=True, slots=True)
class QuestionOptions:
    """What is asked of each image."""

    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What is asked of each image; {field} stands for a field of its row, {name} for"
            " its name, {{ for a brace.",
            show_default=f"'{DESCRIPTION_PROMPT}'; the example model is asked in its own words",
        ),
    ] = None
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A JSON schema that each reply follows."),
    ] = None


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Who does the work."""

    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=100_000,
            help="Processes that hold a model each. More than one need Ray: pip install"
            " 'fastvlm[ray]'.",
            show_default="as many as there are GPUs, or"
            f" {CORES_OF_WORKER} cores for each; 1 without Ray",
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A Ray cluster to work on, such as auto, HOST:6379 or ray://HOST:10001; input,"
            " output and model then lie where all of its machines find them.",
        ),
    ] = None
    max_slots: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=4096, help="Images that a worker decodes together."),
    ] = 16
    image_threads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1024,
            help="Threads of a worker that decode image files.",
            show_default=f"one for each core, up to {MAX_IMAGE_THREADS}",
        ),
    ] = None

    def count(self, device: str) -> int | None:
        """Return the number of workers; None for what a cluster has room for.

        Args:
            device: Where they compute.

        Raises:
            InputError: They need Ray, which is not installed.
        """
        installed = find_spec("ray") is not None
        if not installed and (self.address is not None or (self.workers or 1) > 1):
            raise InputError(
                "More than one worker, and a cluster's --address, need Ray:"
                " pip install 'fastvlm[ray]'."
            )
        if self.workers is not None or self.address is not None:
            return self.workers
        if not installed:
            return 1
        if device == "cuda":
            import torch

            return torch.cuda.device_count()
        return max(1, usable_cores() // CORES_OF_WORKER) if device == "cpu" else 1


def caption(
    *,
    collection: CollectionOptions,
    output: OutputOptions,
    model: ModelOption = None,
    asked: QuestionOptions,
    drafting: DraftOptions,
    sampling: SamplingOptions,
    workers: WorkerOptions,
    runtime: DecodingRuntime,
) -> None:
    """Write a caption of each image of a collection, or whatever else is asked of it.

    The output is a file for each part of the input; what is finished is not done again. It depends
    on the input, the model and the question alone: neither on the number of workers nor on what
    failed meanwhile. Where images have failed, the exit code is 1.
    """
    layers_in(drafting.skipped_layers)
    question = question_of(asked, sampling, model, output.copy)
    check_folder(output.folder, "OUTPUT")
    from fastvlm.captioning.files import FAILED_FILE_NAME, LISTING_FILE_NAME, PartFiles
    from fastvlm.captioning.identity import model_identity
    from fastvlm.captioning.loop import CaptionJob
    from fastvlm.data.image_sources import find_images

    count, place = workers.count(runtime.device), Path(collection.source)
    files = PartFiles(output.folder.absolute(), output.format, question.copied)
    with locked(output.folder):
        source = find_images(
            collection.source,
            output.folder / LISTING_FILE_NAME,
            collection.part_size,
            collection.split,
        )
        files.begin(
            {
                "input": [str(place.absolute()) if place.exists() else str(place), source.digest],
                "parts": len(source.parts),
                "model": model_identity(model),
                "dtype": runtime.dtype,
                "runtime": runtime.runtime,
                "quantize": runtime.quantize,
                "question": question.described(),
                "format": output.format,
                "copied fields": list(question.copied),
            }
        )
        threads = runtime.threads
        if workers.address is None and threads is None and count is not None and count > 1:
            threads = max(1, usable_cores() // count)
        job = CaptionJob(
            partial(
                replace(runtime, threads=threads).load,
                model,
                drafting.draft,
                max_slots=workers.max_slots,
            ),
            drafting.strategy_of,
            question,
            files,
            workers.image_threads or min(MAX_IMAGE_THREADS, usable_cores()),
        )
        finished = files.finished()
        todo = [pair for pair in enumerate(source.parts) if pair[0] not in finished]
        if todo:
            if count == 1 and workers.address is None:
                results = job.run(todo)
            else:
                from fastvlm.cluster.captions import caption_on_ray

                results = caption_on_ray(job, todo, count, workers.address, runtime.device)
            follow(results, todo, runtime, output.max_failed)
        failed = files.collect_failures(len(source.parts))
    PlainConsole().print(
        f"Parts in {output.folder}: {len(source.parts):,}."
        f" Images that failed: {failed:,}{', see ' + FAILED_FILE_NAME if failed else ''}."
    )
    if failed:
        raise typer.Exit(1)


def follow(
    results: Generator[PartResult],
    todo: Sequence[NumberedPart],
    runtime: DecodingRuntime,
    max_failed: float,
) -> None:
    """Show the progress of the work, and end it where too much of it fails.

    Args:
        results: The parts as they are finished, in any order.
        todo: All of them.
        runtime: How to compute, and whether to show anything.
        max_failed: The most images that may fail, as a share.

    Raises:
        InputError: More fail.
    """
    from fastvlm.data.broken import BrokenRecords

    counts = [part.count for _, part in todo]
    known = None not in counts
    total = sum(count or 0 for count in counts) if known else len(todo)
    broken = BrokenRecords(max_failed, what="images", failed="have no caption")
    done = 0
    with (
        closing(results),
        runtime.progress("Captioning", "images" if known else "parts") as show,
    ):
        for result in results:
            broken.seen += result.images
            for one in result.failed:
                broken.add(one)
            done += result.images if known else 1
            show(done, total)
    broken.check()


def question_of(
    asked: QuestionOptions,
    sampling: SamplingOptions,
    model: str | None,
    copied: Sequence[str] | None,
) -> Question:
    """Return what is asked of each image.

    Raises:
        UsageError: The prompt is no template, the schema no JSON schema, or an option is out of
            range.
        InputError: The schema can't be read.
    """
    from fastvlm.captioning.loop import Question
    from fastvlm.captioning.template import PromptTemplate
    from fastvlm.decoding.structured import StructuredOutput

    options = sampling.given()
    schema = None if asked.json_schema is None else read_text(asked.json_schema)
    with usage():
        if schema is not None:
            options["structured"] = StructuredOutput("json", schema)
        template = PromptTemplate(asked.prompt or description_prompt(model))
    return Question(template, options, tuple(dict.fromkeys(copied or ())))
