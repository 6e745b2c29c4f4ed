"""What a finished run has written."""

from __future__ import annotations

STEPS = 2000
SCORES = {"fd": 3.0, "kid": 0.01, "precision": 0.8, "coverage": 0.8}
RESULT = {
    "name": "a", "method": "dmd2", "recipe_hash": "0123456789ab", "seed": 0, "stillroom": "0", "torch": "0",
    "machine": "m",
    "finished": "2026-01-01T00:00:00Z", "data": "d", "rows": ["bar", "dot"],
    "cost": {"step": STEPS, "images": 64 * STEPS, "seconds": 100.0},
    "student": {"nfe": 1, "params": 1_000_000, "latency_ms": {"1": 3.0, "32": 30.0}},
    "teacher": {"nfe": 49, "params": 1_000_000, "latency_ms": {"1": 150.0, "32": 1500.0}},
    "bench": {"n": 5000, "extractor": "x@12345678", "reference": "test split"},
    "task": "class-images", "things": "images", "teachers": ["teacher"],
    "metrics": [
        {"key": "fd", "name": "FD-x@12345678, N=5000", "better": "lower", "label": "Fréchet distance", "alarm": 3.0,
         "advice": "more steps first; then the learning rates"},
        {"key": "kid", "name": "KID-x@12345678, N=5000", "better": "lower"},
        {"key": "precision", "name": "Precision"},
        {"key": "coverage", "name": "Coverage", "alarm": 0.6, "advice": "less guidance",
         "says": "the student leaves out part of the data"},
    ],
    "scores": {"student": SCORES, "teacher": SCORES | {"fd": 2.0}, "floor": SCORES | {"fd": 0.5}},
}  # fmt: skip
