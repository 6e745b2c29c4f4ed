"""Trajectory distillation: the student learns the teacher's path from noise to data."""
