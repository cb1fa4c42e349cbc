"""Real tasks that a model learns in about a minute on one core: the data, a model, and how well it does."""

from __future__ import annotations

from studies.tasks.characters import Characters
from studies.tasks.pronunciation import Pronunciation
from studies.tasks.sounds import Sounds
from studies.tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Characters, Pronunciation, Sounds)}
