"""lm-eval's tasks, opened by name. Where the model hub cannot be reached, that is said at once."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager

from moepp.model.errors import InputError
from moepp.system.hub import go_offline_without_a_network
from moepp.text.documents import Document, Source
from moepp.training.option_names import did_you_mean

HERE = Path(__file__).parent


def open_tasks(names: list[str], include_path: str | None = None) -> dict[str, Any]:
    """Groups of tasks, and tasks that are in none of these, by their names, with their data.

    Args:
        names: of lm-eval's tasks, groups or tags, of ours (`paper`), or of those in `include_path`.
        include_path: a folder of more task files.

    Raises:
        InputError: there is none of a name, its data cannot be had, or two groups have the same task.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"include_path: {include_path} is no folder")
    if "LMEVAL_LOG_LEVEL" not in os.environ:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = [include_path] if include_path else []
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):  # to look through all of lm-eval's takes ten seconds
        manager = TaskManager(include_path=[HERE, *own])
    groups: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    datasets.disable_progress_bars()  # of local files; downloads show theirs
    go_offline_without_a_network()
    for name in dict.fromkeys(names):
        if name not in manager.all_tasks and not Path(name).is_file():
            raise InputError(f"tasks: {name!r} is no task of lm-eval{did_you_mean(name, manager.all_tasks)}")
        try:
            found = manager.load([name])
        except Exception as error:  # of a task file that says nonsense, or whose data says it, anything
            raise InputError(f"tasks: {name}: {reason(error)}") from error
        if name in found["groups"]:
            if twice := members(groups).keys() & found["tasks"].keys():
                raise InputError(f"tasks: {name} has {min(twice)}, as another group has; give it a run of its own")
            groups[name] = found["groups"][name]
        else:
            tasks |= found["tasks"]
    within = members(groups)  # lm-eval takes none twice
    return groups | {name: task for name, task in tasks.items() if name not in within}


def members(opened: dict[str, Any]) -> dict[str, Any]:
    """Tasks, and those of groups, by name."""
    flat: dict[str, Any] = {}
    for name, each in opened.items():
        if isinstance(each, Group):
            flat |= {task.task_name: task for task in each.get_all_tasks()}
        else:
            flat[name] = each
    return flat


def reason(error: Exception) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ConnectionError) or "://" in line:
        return (
            f"{line}: without a network only data that was fetched before can be read; "
            "or name tasks of your own (--include_path)"
        )
    return line if isinstance(error, OSError) else f"{type(error).__name__}: {line}"


def task_text(name: str, include_path: str | None = None) -> Source:
    """The documents of a task, or of each task of a group, as text: the context and its right continuation.

    Raises:
        InputError: as `open_tasks`.
    """
    tasks = members(open_tasks([name], include_path))

    def documents() -> Iterator[Document]:
        for task_name, task in tasks.items():
            task.set_config(key="num_fewshot", value=0)
            task.build_all_requests()
            requests: dict[int, list[Any]] = {}
            for request in task.instances:
                requests.setdefault(request.doc_id, []).append(request)
            for of_document in requests.values():
                yield task_name, right_text(task, of_document)

    return Source(name, {}, None, documents)


def right_text(task: Any, requests: list[Any]) -> str:
    """Of one document's requests that with the right answer, as text."""
    doc = requests[0].doc
    if task.OUTPUT_TYPE == "multiple_choice":
        # where choices stand in the context, the text says which
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        gold = gold[0] if isinstance(gold, list) else gold
        at = task.doc_to_choice(doc).index(gold) if isinstance(gold, str) else gold
        return "".join(requests[at].args[:2])
    if task.OUTPUT_TYPE == "generate_until":
        target = task.doc_to_target(doc)
        answer = target[0] if isinstance(target, list) else target
        return requests[0].args[0] + task.config.target_delimiter + str(answer)
    return "".join(requests[0].args)
