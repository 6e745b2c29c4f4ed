"""Small denoisers, and three steps of training for one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import RectifiedFlow
from stillroom.folders.diffusers_networks import denoiser_from_diffusers, make_network
from stillroom.networks.point_mlp import PointMLP
from stillroom.surgery.lora import LoraDenoiser


def point_teacher() -> Denoiser:
    torch.manual_seed(3)
    return Denoiser(PointMLP(2, 16, 3, 4), RectifiedFlow(), "v", null={"label": 4}, shape=(2,))


def dit_teacher() -> Denoiser:
    torch.manual_seed(3)
    network = make_network(
        "DiTTransformer2DModel",
        {
            "in_channels": 1, "out_channels": 1, "sample_size": 8, "patch_size": 4, "num_layers": 3, "dropout": 0.0,
            "num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 4,
        },
    )  # fmt: skip
    for p in network.parameters():  # zero-initialised gates would hide every block
        nn.init.normal_(p, std=0.2)
    return denoiser_from_diffusers(network, {"_class_name": "FlowMatchEulerDiscreteScheduler"})


def ask(denoiser: Denoiser) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *denoiser.shape, generator=generator)
    return denoiser(x, torch.tensor([0.2, 0.4, 0.6, 0.8]), {"label": torch.tensor([0, 1, 2, 3])}).value


def train(role: LoraDenoiser, steps: int = 3) -> None:
    own = role.role_parameters()
    for p in own.values():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(own.values(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (ask(role) - 1).square().mean().backward()
        optimizer.step()
    for p in own.values():
        p.requires_grad_(False)
