"""Tasks to train looped models on, and their tokenizers."""

from loop_lens.data.addition import AdditionTask
from loop_lens.data.composition import CompositionTask
from loop_lens.data.hops import HopsTask
from loop_lens.data.task import IGNORED, Split, Task, TaskBatch
from loop_lens.data.text import TextTask

__all__ = ["IGNORED", "AdditionTask", "CompositionTask", "HopsTask", "Split", "Task", "TaskBatch", "TextTask"]
