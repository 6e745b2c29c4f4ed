"""Start a server as docs/export.md shows it, ask it once on loopback, and compare with the student's own answer.

    PYTHONPATH=src python tools/serve.py LitServe --python VENV/bin/python
    PYTHONPATH=src python tools/serve.py Triton --python VENV/bin/python

``--python``: the interpreter of an environment with the server's packages (the page names them); by default this one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "export.md"
PORT = "8000"
"""In the page's code; another one that is free is taken instead."""
PATIENCE = 300
"""Seconds until a server must answer."""
TEXTS = ["a small dog runs", "the old stone"]


@dataclass
class Server:
    """packages: whose versions are told. ready: the path that answers 200 once the model is there. ask: makes what the
    server reads in the working folder, and returns ``(path, body, compare)`` of the request, where ``compare`` takes
    the answer to its largest difference from the student's own."""

    packages: tuple[str, ...]
    ready: str
    ask: Callable[[], tuple[str, dict[str, Any], Callable[[Any], float]]]


def texts() -> tuple[str, dict[str, Any], Callable[[Any], float]]:
    """A text classifier's folder (untrained: its answers are compared, not judged)."""
    import torch

    from stillroom.data.texts import NAMED
    from stillroom.folders.text_networks import load_tokenizer, make_encoder
    from stillroom.tasks.classify_text.model import TextClassifier

    torch.manual_seed(0)
    tokenizer, classes = load_tokenizer(NAMED["glosses"]), [f"class {i}" for i in range(5)]
    student = TextClassifier(make_encoder("bert-2x64", len(tokenizer), len(classes)), tokenizer, classes, 64)
    student.save("runs/ernie-tiny/student")
    expected = student.probabilities(TEXTS)

    def compare(answer: Any) -> float:
        scores = [{entry["label"]: entry["score"] for entry in row} for row in answer["answers"]]
        found = torch.tensor([[row[name] for name in classes] for row in scores])
        return float((found - expected).abs().max())

    return "/predict", {"texts": TEXTS}, compare


def generator() -> tuple[str, dict[str, Any], Callable[[Any], float]]:
    """The shipped image model as a one-step generator, exported whole."""
    import torch

    import stillroom
    from stillroom.diffusion.sampling import FewStepSampler
    from stillroom.exports import export_model
    from stillroom.tasks.class_images.model import ImageGenerator

    shipped: Any = stillroom.load("fashion")
    student = ImageGenerator(shipped.denoiser, FewStepSampler((0.8,)), shipped.classes)
    export_model(student, "onnx", "exports/dmd2-onnx", whole=True, seconds=0.0)
    noise, label = torch.randn(3, *student.denoiser.shape), torch.tensor([0, 1, 2])
    expected = student.sampler.sample(student.denoiser, noise, {"label": label})

    def compare(answer: Any) -> float:
        (images,) = answer["outputs"]
        return float((torch.tensor(images["data"]).reshape(images["shape"]) - expected).abs().max())

    inputs = [
        {"name": "noise", "datatype": "FP32", "shape": list(noise.shape), "data": noise.flatten().tolist()},
        {"name": "label", "datatype": "INT64", "shape": [len(label), 1], "data": label.tolist()},
    ]
    return "/v2/models/dmd2/infer", {"inputs": inputs}, compare


SERVERS = {
    "LitServe": Server(("litserve", "transformers", "torch"), "/health", texts),
    "Triton": Server(("nvidia-pytriton", "onnxruntime"), "/v2/models/dmd2/ready", generator),
}
"""By the heading of their code in the page."""


def code_of(heading: str) -> str:
    """The first Python block under a heading of the page."""
    page = PAGE.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^### {heading}\n.*?```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    return found


def call(url: str, body: dict[str, Any] | None = None, seconds: float = 60.0) -> bytes:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return answer.read()


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def versions(python: str, packages: tuple[str, ...]) -> str:
    code = "import sys, importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    return subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout.strip()


def try_server(name: str, python: str) -> float:
    """The largest difference. Raises RuntimeError where no answer comes in time."""
    server, port = SERVERS[name], free_port()
    path, body, compare = server.ask()
    Path("server.py").write_text(code_of(name).replace(PORT, port), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with open("server.log", "wb") as log:
        process = subprocess.Popen(
            [python, "server.py"], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                call(f"http://127.0.0.1:{port}{server.ready}", seconds=5)
                break
            except (urllib.error.URLError, OSError) as error:
                if process.poll() is not None or time.monotonic() > end:
                    tail = Path("server.log").read_text(encoding="utf-8", errors="replace")[-3000:]
                    raise RuntimeError(f"{name} does not answer ({error}):\n{tail}") from None
                time.sleep(1)
        return compare(json.loads(call(f"http://127.0.0.1:{port}{path}", body)))
    finally:
        for how in (signal.SIGINT, signal.SIGKILL):  # to the server and all that it has started
            try:
                os.killpg(process.pid, how)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("server", choices=SERVERS)
    parser.add_argument("--python", default=sys.executable)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        off = try_server(asked.server, asked.python)
        os.chdir(ROOT)
    print(f"{asked.server} ({versions(asked.python, SERVERS[asked.server].packages)}): largest difference {off:.1e}")
    return 0 if off < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
