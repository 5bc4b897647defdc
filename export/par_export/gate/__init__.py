"""The parity gate: the exported graphs on ONNX Runtime against the PyTorch oracle; an export that fails publishes nothing."""
