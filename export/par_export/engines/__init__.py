"""Bundle to engine: TensorRT plans, built, reported, cached and tuned. Needs onnx and TensorRT, but not torch."""
