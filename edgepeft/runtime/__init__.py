"""Inference on the device: onnxruntime, tokenizers and numpy, never torch or transformers."""
