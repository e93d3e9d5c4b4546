"""From a torch model to ONNX graphs: export, quantise, and prove that nothing was lost on the way."""
