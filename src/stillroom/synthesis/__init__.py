"""Data distillation: teachers draw captions into a store (arXiv 2503.08619, section 3.1)."""

from stillroom.data.captioned_folders import FolderTeacher, read_captions
from stillroom.evaluation.filters import Filter, filters, register_filter
from stillroom.synthesis.execution import Synthesis, plan_hash, synthesize
from stillroom.synthesis.plan import ROUTES, SynthesisPlan, make_plan
from stillroom.synthesis.teachers import PipelineTeacher, Teacher

__all__ = [
    "ROUTES",
    "Filter",
    "FolderTeacher",
    "PipelineTeacher",
    "Synthesis",
    "SynthesisPlan",
    "Teacher",
    "filters",
    "make_plan",
    "plan_hash",
    "read_captions",
    "register_filter",
    "synthesize",
]  # fmt: skip
