"""Tasks with models of transformers: image classification, causal language modelling.

They need the extra `hf`.

    [task]
    name = "hf-image-classification"
    options = { model = { name = "models/vit-base" }, data = { name = "data/flowers" } }

Models and data sets are folders on disk, read without network access, or names on the hub. Weights are read only from
safetensors, and no code that comes with a model is run. With the option `model.lora` the base is frozen, and agents
train, exchange, checkpoint and merge only the adapters.
"""

from dimat.tasks.huggingface.images import hf_image_classification
from dimat.tasks.huggingface.text import hf_causal_lm

__all__ = ["hf_causal_lm", "hf_image_classification"]
