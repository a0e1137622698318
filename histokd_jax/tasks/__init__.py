"""What the trainer, the command line and the sweep must know about the kind of answer a model gives.

A `Task` owns the fields of a sample, the tables of predictions, the metrics of validation and of the summary. Nothing
else in the library asks whether it trains a classification or a survival model.
"""

from histokd_jax.tasks.base import Found, Rows, Table, Tables, Targets, Task
from histokd_jax.tasks.registry import KINDS, get_task, kind_of

__all__ = ["KINDS", "Found", "Rows", "Table", "Tables", "Targets", "Task", "get_task", "kind_of"]
