"""`fastvlm evaluate`: whether a model sees what photographs show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastvlm import embedded
from fastvlm.cli.files import check_writable, write_json
from fastvlm.cli.loading import ModelOption, ThreadsOption, load_quietly
from fastvlm.cli.terminal import progress


def evaluate(
    photographs: Annotated[
        Path, typer.Option(metavar="DIR", help="Captioned photographs in Flickr8k's layout.")
    ],
    *,
    split: Annotated[str, typer.Option(help="Which split: the name of a list of files.")] = "dev",
    model: ModelOption = None,
    limit: Annotated[int, typer.Option(min=2, help="The most photographs.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Photographs decoded together.")] = 50,
    threads: ThreadsOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the figures to this file too."),
    ] = None,
) -> None:
    """Score one-sentence captions (BLEU, ROUGE-L, CIDEr), and the loss with a wrong picture."""
    if json_file is not None:
        check_writable(json_file)
    from fastvlm.data.captioned import read_flickr8k
    from fastvlm.evaluation.quality import caption_losses, score_photographs

    shown = read_flickr8k(photographs, split)[:limit]
    vlm = load_quietly(embedded.MODEL if model is None else model, threads=threads)
    texts: list[str] = []
    with progress("Captioning") as report:
        for start in range(0, len(shown), batch):
            paths = [photograph.path for photograph in shown[start : start + batch]]
            prompts = [embedded.SENTENCE_PROMPT] * len(paths)
            texts += [r.text for r in vlm.generate_batch(prompts, paths, max_new_tokens=64)]
            report(len(texts), len(shown))
    scores = {**score_photographs(shown, texts), "loss": caption_losses(vlm, shown)}
    if json_file is not None:
        write_json(json_file, scores)
    Console(highlight=False).print(
        f"{len(shown)} photographs: CIDEr {scores['cider']:.3f}, BLEU-4 {scores['bleu'][3]:.3f},"
        f" ROUGE-L {scores['rouge_l']:.3f}; {scores['distinct_captions']} different captions.\n"
        f"Loss per token of a human caption with the right picture"
        f" {scores['loss']['right']:.3f}, with another one {scores['loss']['wrong']:.3f}."
    )
