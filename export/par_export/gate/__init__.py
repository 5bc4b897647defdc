"""The parity gate: exported graphs on ONNX Runtime must agree with the PyTorch oracle before they are published."""
