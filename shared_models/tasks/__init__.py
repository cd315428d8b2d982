"""What a model is asked to do, and how well it did it: one file per task.

``BUILTIN`` names each task's ``make(**params) -> Task``. See ``base.py`` for what a task is.
"""

from shared_models.tasks.base import Box, Free, Task, as_it_is, moved_map, objection_to_loss

BUILTIN = {
    "anomaly": "shared_models.tasks.anomaly:make",
    "classification": "shared_models.tasks.classification:make",
    "clustering": "shared_models.tasks.clustering:make",
    "denoising": "shared_models.tasks.denoising:make",
    "detection": "shared_models.tasks.detection:make",
    "embedding": "shared_models.tasks.embedding:make",
    "enhancement": "shared_models.tasks.enhancement:make",
    "generation": "shared_models.tasks.generation:make",
    "localization": "shared_models.tasks.localization:make",
    "reconstruction": "shared_models.tasks.reconstruction:make",
    "segmentation": "shared_models.tasks.segmentation:make",
    "series-classification": "shared_models.tasks.series:make",
}

__all__ = ["BUILTIN", "Box", "Free", "Task", "as_it_is", "moved_map", "objection_to_loss"]
