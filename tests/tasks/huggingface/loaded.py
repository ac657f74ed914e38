"""Loads what processes with Hugging Face tasks load, for a fork server to load it once."""

from __future__ import annotations

from importlib import import_module

from dimat.tasks.huggingface.library import library

for name in ("transformers", "peft"):  # datasets starts a thread
    library(name)
for name in ("gpt2", "llama"):
    import_module(f"transformers.models.{name}.modeling_{name}")
