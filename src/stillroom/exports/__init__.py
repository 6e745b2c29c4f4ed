"""Finished models as files of other runtimes: torch.export, ONNX and OpenVINO, checked and timed against eager."""

from stillroom.exports.writing import Exported, export_model

__all__ = ["Exported", "export_model"]
