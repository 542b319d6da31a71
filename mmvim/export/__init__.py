"""Models as files that run without mmvim: ONNX, TorchScript, ``torch.export``, AOTInductor."""
