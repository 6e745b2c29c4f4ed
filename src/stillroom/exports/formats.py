"""The formats: how a file of each is written, opened by its own runtime, and which packages that takes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.errors import UserError
from stillroom.task import Part, Runner

ONE_FILE = 1_500_000_000
"""Bytes of weights above which ONNX keeps them in a file beside the graph: protobuf ends at 2 GB."""


@dataclass(frozen=True)
class Format:
    """suffix: of the file. needs: packages. write: ``(program, path, part)``. open: path to a runner,
    on one thread."""

    suffix: str
    needs: tuple[str, ...]
    write: Callable[[Any, Path, Part], None]
    open: Callable[[Path], Runner]

    def check(self, name: str) -> None:
        """Raises UserError where a package is missing."""
        for package in self.needs:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"exporting to {name} needs {package}", cure="pip install 'stillroom[export]'")

    def versions(self) -> dict[str, str]:
        return {package: version(package) for package in ("torch", *self.needs)}


def capture(part: Part) -> Any:
    """The part as a ``torch.export.ExportedProgram`` whose batch, and whatever else ``part.axes`` names, is free."""
    inputs, free = part.example(2, torch.Generator().manual_seed(0)), torch.export.Dim.DYNAMIC
    shapes = tuple({0: free, **dict.fromkeys(part.axes.get(name, {}), free)} for name in part.inputs)
    with torch.no_grad(), quiet():
        return torch.export.export(part.module.eval(), inputs, dynamic_shapes=_as_signature(part, shapes))


def _as_signature(part: Part, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """``shapes`` nested as the arguments of ``forward`` are: what ``*args`` takes is one tuple."""
    import inspect

    kinds = [p.kind for p in inspect.signature(part.module.forward).parameters.values()]
    plain = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
    rest = inspect.Parameter.VAR_POSITIONAL in kinds
    return (*shapes[:plain], shapes[plain:]) if rest else shapes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' notes on packages that are not there and on torch's own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- torch ------------------------------------------------------------------------------------------------------------
def _write_torch(program: Any, path: Path, part: Part) -> None:
    torch.export.save(program, path)


def _open_torch(path: Path) -> Runner:
    with quiet():
        module = torch.export.load(path).module()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            output = module(*inputs)
        return (output,) if isinstance(output, Tensor) else tuple(output)

    return run


# --- ONNX -------------------------------------------------------------------------------------------------------------
def _write_onnx(program: Any, path: Path, part: Part) -> None:
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    with torch.no_grad(), quiet():
        made = torch.onnx.export(
            program, dynamo=True, input_names=list(part.inputs), output_names=list(part.outputs), verbose=False
        )
        assert made is not None
        made.save(path, external_data=size > ONE_FILE)


def _open_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        answers = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return tuple(torch.from_numpy(answer) for answer in answers)

    return run


def quantize(source: Path, path: Path) -> None:
    """``source`` with 8-bit weights and activations that are quantised as they come, for matrix products and
    convolutions (onnxruntime's dynamic quantisation)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it recommends a preparation that the exporter has already done
    try:
        # unsigned, because onnxruntime's convolutions take no signed weights
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
    finally:
        logging.root.setLevel(level)


# --- OpenVINO ---------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """OpenVINO reports its import and each conversion to its makers, unless it believes to run in CI."""
    usual = os.environ.get("CI")
    os.environ["CI"] = "true"
    try:
        yield
    finally:
        if usual is None:
            del os.environ["CI"]
        else:
            os.environ["CI"] = usual


def _write_openvino(program: Any, path: Path, part: Part) -> None:
    with torch.no_grad(), quiet(), unreported():
        openvino: Any = importlib.import_module("openvino")
        model = openvino.convert_model(program)
    for ports, names in ((model.inputs, part.inputs), (model.outputs, part.outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _open_openvino(path: Path) -> Runner:
    with unreported():
        openvino: Any = importlib.import_module("openvino")
    # without the hint, processors with bf16 units compute in bf16
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        answers = compiled([value.numpy() for value in inputs])
        return tuple(torch.from_numpy(answers[i].copy()) for i in range(len(compiled.outputs)))

    return run


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _open_onnx),
    "openvino": Format(".xml", ("openvino",), _write_openvino, _open_openvino),
    "torch": Format(".pt2", (), _write_torch, _open_torch),
}
