"""The parity gate: the exported graphs on ONNX Runtime must agree with the PyTorch oracle before a bundle is published."""
