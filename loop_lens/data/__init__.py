"""Tasks to train looped models on, and their tokenizers."""

from loop_lens.data.task import IGNORED, Split, Task, TaskBatch

__all__ = ["IGNORED", "Split", "Task", "TaskBatch"]
