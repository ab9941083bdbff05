"""What the server of ``tests.forked`` imports before it forks: what a training run imports sooner or later."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: E402, F401
import deepspeed.runtime.zero.muon.original_muon  # noqa: E402, F401  (the first engine under ZeRO imports it)
import fairscale.nn.checkpoint  # noqa: E402, F401
import timm  # noqa: E402, F401
import torch.utils.tensorboard  # noqa: E402, F401

import ummim.attention_maps  # noqa: E402, F401
import ummim.data.loader  # noqa: E402, F401
import ummim.engine.trainer  # noqa: E402, F401
import ummim.pretrain  # noqa: E402, F401
import ummim.recipe_file  # noqa: E402, F401
import ummim.reconstruct  # noqa: E402, F401
