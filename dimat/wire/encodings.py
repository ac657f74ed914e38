"""The encodings of snapshots: names, as manifests and configuration say them."""

ENCODINGS = ("fp32", "bf16", "fp16", "int8")
