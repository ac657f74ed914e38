"""Settings of all tests: workers share few cores, so each computes with one thread, and no test waits on a clock."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("dimat", deadline=None)
settings.load_profile("dimat")
