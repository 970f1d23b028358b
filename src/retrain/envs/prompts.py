"""Prompts that have a task's columns filled in."""

from __future__ import annotations

from retrain.types import Task, UserError


def fill(template: str, task: Task, place: str) -> str:
    """A format string over a task's columns, `{prompt}` (its last message) and `{answer}` too.

    Args:
        place: the key in the config that the template comes from.

    Raises:
        UserError: it asks for a column that the task lacks.
    """
    columns = {
        **task.metadata,
        "prompt": task.prompt[-1].content if task.prompt else "",
        "answer": task.answer,
    }
    try:
        return template.format(**columns)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{place} asks for {error}, which task {task.id} lacks",
            f"Columns: {', '.join(sorted(columns))}.",
        ) from error
