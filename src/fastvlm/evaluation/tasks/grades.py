"""Grades of judged replies, from a judge or from a publisher's own evaluator."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm.data.journal import append_line, whole_lines
from fastvlm.data.tasks import EvaluationTask
from fastvlm.data.tasks.llava_wild import LlavaWild, read_reviews
from fastvlm.data.tasks.mmvet import read_grades
from fastvlm.evaluation.measuring import no_progress
from fastvlm.evaluation.tasks.answers import Answer
from fastvlm.evaluation.tasks.judge import Judge
from fastvlm.functional.files import write_text

Graded = dict[tuple[str, str, str], Any]
"""Grades by task, item and reply, in the form that the task's `score` takes."""


def published(
    name: str, task: EvaluationTask[Any], file: Path, answers: Iterable[Answer]
) -> Graded:
    """Return grades from a file that a publisher's own evaluator wrote.

    Args:
        name: The task's name.
        task: MM-Vet or LLaVA-Bench.
        file: MM-Vet's file of grades, or LLaVA-Bench's file of reviews.
        answers: The answers that were graded.

    Raises:
        InputError: The file has another layout.
    """
    read: Callable[[Path], Mapping[str, Any]]
    read = read_reviews if isinstance(task, LlavaWild) else read_grades
    grades = read(file)
    return {
        (name, answer.item, answer.text): grades[answer.item]
        for answer in answers
        if answer.item in grades
    }


def judged(
    judge: Judge,
    tasks: Mapping[str, EvaluationTask[Any]],
    answers: Iterable[Answer],
    journal: Path,
    progress: Callable[[int, int], None] = no_progress,
) -> Graded:
    """Return grades of all replies to judged tasks, from the journal or else from the judge.

    Args:
        judge: The judge.
        tasks: All tasks by name.
        answers: All answers.
        journal: A file of JSON lines; another judge's grades in it are ignored.
        progress: Called with the replies graded and their total, of those that the journal lacks.

    Raises:
        InputError: The judge can't be reached, or doesn't answer with grades.
    """
    known: Graded = {
        (line["task"], line["item"], line["reply"]): line["grades"]
        for line in whole_lines(journal)
        if line["judge"] == judge.model
    }
    wanted = dict.fromkeys(
        (answer.task, answer.item, answer.text) for answer in answers if tasks[answer.task].judged
    )
    left = [key for key in wanted if key not in known]
    for done, (task, item, reply) in enumerate(left, 1):
        grades = judge.grade(tasks[task], item, reply)
        known[task, item, reply] = grades
        line = {"judge": judge.model, "task": task, "item": item, "reply": reply, "grades": grades}
        append_line(journal, line)
        progress(done, len(left))
    return known


def write_submission(
    folder: Path, name: str, task: EvaluationTask[Any], answers: Sequence[Answer], model: str
) -> Path:
    """Write replies in the format of a judged benchmark's own evaluator; return the file.

    Args:
        folder: The folder to write to.
        name: The task's name.
        task: MM-Vet, whose evaluator takes a JSON of replies by item, or LLaVA-Bench, whose
            evaluator takes a line for each reply.
        answers: The replies.
        model: The model's name.
    """
    folder.mkdir(exist_ok=True)
    if isinstance(task, LlavaWild):
        prompts = {item.id: item.prompt for item in task.items}
        lines: list[dict[str, Any]] = [
            {
                "question_id": int(answer.item) if answer.item.isdigit() else answer.item,
                "prompt": prompts[answer.item],
                "text": answer.text,
                "answer_id": f"{name}-{answer.item}",
                "model_id": model,
                "metadata": {},
            }
            for answer in answers
        ]
        file = folder / f"{name}.jsonl"
        write_text(file, "".join(f"{json.dumps(line)}\n" for line in lines))
        return file
    file = folder / f"{name}.json"
    replies = {answer.item: answer.text for answer in answers}
    write_text(file, json.dumps(replies, indent=2) + "\n")
    return file
