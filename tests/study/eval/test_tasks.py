"""The paper's nine tasks with its shots, logiqa as lm-eval has it, a task's right answers as text."""

import json
from pathlib import Path

import yaml
from lm_eval.tasks.logiqa.utils_logiqa import doc_to_target, doc_to_text

from moepp.study.tasks import open as opening
from moepp.study.tasks.open import open_tasks, task_text
from tests.study.eval.conftest import documents, write_documents, write_task

HERE = Path(opening.__file__).parent
PARAGRAPHS = """
b
Some men are mortal.All Greeks are men.
What follows?
A.Nothing.At all
B.Something
C.All of it
D.None, or all.

d
It rains. It pours
Who snores?
A.The new man.
B.The young man.
C.Nobody
D.The old man.
"""


def test_the_papers_nine_tasks_and_shots() -> None:
    paper = yaml.safe_load((HERE / "paper.yaml").read_text())
    shots = {task["task"]: task["num_fewshot"] for task in paper["task"]}
    zero = ("sciq", "piqa", "winogrande", "arc_easy", "logiqa", "lambada_openai")
    assert shots == dict.fromkeys(zero, 0) | {"hellaswag": 10, "boolq": 32, "nq_open": 32}


def test_logiqa_reads_as_in_lm_eval(there: Path) -> None:
    (there / "logiqa.txt").write_text(PARAGRAPHS)
    config = yaml.safe_load((HERE / "logiqa.yaml").read_text())
    files = config["dataset_kwargs"]["data_files"]
    files |= dict.fromkeys(files, str(there / "logiqa.txt"))
    (there / "tasks").mkdir()
    (there / "tasks" / "logiqa.yaml").write_text(json.dumps(config))
    task = open_tasks(["logiqa"], "tasks")["logiqa"]
    docs = list(task.eval_docs)
    assert len(docs) == 2
    for doc, paragraph in zip(docs, PARAGRAPHS.strip().split("\n\n"), strict=True):
        # as its script reads a paragraph
        label, *lines = paragraph.split("\n")
        lines = [*lines[:2], *(option[2:] for option in lines[2:])]
        context, question, *options = [line.replace(".", ". ").strip() for line in lines]
        theirs = {"label": label, "context": context, "question": question, "options": options}
        assert task.doc_to_text(doc) == doc_to_text(theirs)
        assert task.doc_to_choice(doc) == options
        assert task.doc_to_target(doc) == doc_to_target(theirs)


def test_documents_are_read_with_their_right_answers(there: Path, tasks: Path) -> None:
    right = [f"{d['start']} {d['ends'][d['gold']]}" for d in documents()]
    for name in ("choice", "last_word", "written"):
        source = task_text(name, str(tasks))
        assert [text for _, text in source.documents()] == right
        assert {domain for domain, _ in source.documents()} == {name}
    assert [text for _, text in task_text("rolling", str(tasks)).documents()] == [d["text"] for d in documents()]


def test_choices_in_the_context(there: Path) -> None:
    """As winogrande has them: the text is the number of the right choice, and the target is what follows each."""
    choice = {"doc_to_text": "{{gold}}", "doc_to_choice": "ends", "doc_to_target": "{{text}}"}
    write_documents(there)
    write_task(there, "inside", output_type="multiple_choice", **choice, metric_list=[{"metric": "acc"}])
    texts = [text for _, text in task_text("inside", str(there)).documents()]
    assert texts == [f"{d['ends'][d['gold']]} {d['text']}" for d in documents()]
