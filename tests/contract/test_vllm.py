"""What we export is what vLLM runs: same prompt ids, same log-probabilities of sampled answers, with pictures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Prompt, Question, render_prompt
from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.data.loader import collate
from megatron_mm.chat.render import Sample
from megatron_mm.models.vlm import Pictures, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.export import write_directory
from megatron_mm.weights.stream import from_hf, to_hf
from megatron_mm.weights.tables import model_table
from tests.tiny import r4b_tensors, reference_models, tiny_config

# fp32 on both sides, sums in another order; measured at 6e-6 on log-probabilities of about -5.
TOLERANCE = 1e-4
PICTURE_SHAPES = ((32, 32), (64, 32), (30, 50), (100, 31), (33, 140))
