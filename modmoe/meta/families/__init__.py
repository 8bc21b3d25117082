"""Families of few-shot tasks: functions, pictures to complete, classes to tell apart; for learn2learn too."""

from modmoe.meta.families.fewshot import Episode, FewShotImages, nearest_prototype, split_classes
from modmoe.meta.families.gaussian_processes import GaussianProcessFamily, GaussianProcessTasks
from modmoe.meta.families.image_sets import ImageSet, load_image_set
from modmoe.meta.families.images import ImageCompletion
from modmoe.meta.families.learn2learn_tasks import (
    FunctionTaskset,
    LabelledImages,
    benchmark_tasksets,
    few_shot_taskset,
    meta_dataset,
)
from modmoe.meta.families.regression import FAMILIES, FamilyTasks, FiveFamilies

__all__ = [
    "FAMILIES",
    "Episode",
    "FamilyTasks",
    "FewShotImages",
    "FiveFamilies",
    "FunctionTaskset",
    "GaussianProcessFamily",
    "GaussianProcessTasks",
    "ImageCompletion",
    "ImageSet",
    "LabelledImages",
    "benchmark_tasksets",
    "few_shot_taskset",
    "load_image_set",
    "meta_dataset",
    "nearest_prototype",
    "split_classes",
]
