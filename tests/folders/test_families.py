"""diffusers' own classes as denoisers: built small from config, asked, tapped; what is not supported says so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.process import EDM, VP, RectifiedFlow, TrigFlow
from stillroom.errors import UserError
from stillroom.folders.diffusers_networks import (
    denoiser_from_diffusers,
    make_network,
    process_from_scheduler,
    scheduler_config,
)
from stillroom.networks.discriminators import Discriminator, block_taps, feature_width, middle_block
from stillroom.surgery.taps import Taps, as_tokens

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
SD = {
    "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon",
}  # fmt: skip
NARROW_UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4,
}  # fmt: skip

# class, config, scheduler, conditions
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    "unet": (
        "UNet2DModel",
        {
            **NARROW_UNET, "in_channels": 2, "out_channels": 2, "num_class_embeds": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        SD,
        lambda: {"label": torch.tensor([0, 1, 2])},
    ),
    "unet-text": (
        "UNet2DConditionModel",
        {
            **NARROW_UNET, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 6,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        SD | {"prediction_type": "v_prediction"},
        lambda: {"encoder_hidden_states": torch.randn(3, 5, 6)},
    ),
    "unet-xl": (
        "UNet2DConditionModel",
        {
            **NARROW_UNET, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 6,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + 10,
        },
        SD,
        lambda: {
            "encoder_hidden_states": torch.randn(3, 5, 6), "text_embeds": torch.randn(3, 10),
            "time_ids": torch.ones(3, 6),
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {
            "in_channels": 2, "out_channels": 4, "sample_size": 8, "patch_size": 2, "num_layers": 3, "dropout": 0.0,
            "num_attention_heads": 2, "attention_head_dim": 8, "num_embeds_ada_norm": 5,
        },
        SD | {"beta_schedule": "linear"},
        lambda: {"label": torch.tensor([0, 1, 4])},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 8, "sample_size": 8, "patch_size": 2, "num_layers": 3,
            "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 6,
        },
        SD | {"beta_schedule": "linear"},
        lambda: {
            "encoder_hidden_states": torch.randn(3, 5, 6), "encoder_attention_mask": torch.ones(3, 5, dtype=torch.bool),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 2, "num_layers": 3,
            "num_attention_heads": 2, "attention_head_dim": 8, "joint_attention_dim": 6, "caption_projection_dim": 16,
            "pooled_projection_dim": 10, "pos_embed_max_size": 8,
        },
        FLOW | {"shift": 3.0},
        lambda: {"encoder_hidden_states": torch.randn(3, 5, 6), "pooled_projections": torch.randn(3, 10)},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4, "out_channels": 4, "sample_size": 8, "patch_size": 1, "num_layers": 3,
            "num_attention_heads": 2, "attention_head_dim": 8, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 6,
        },
        FLOW | {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0,
                "use_flow_sigmas": True},
        lambda: {"encoder_hidden_states": torch.randn(3, 5, 6)},
    ),
}  # fmt: skip


def build(name: str) -> tuple[Denoiser, dict[str, Tensor]]:
    class_name, config, scheduler, cond = FAMILIES[name]
    network = make_network(class_name, config)
    torch.manual_seed(1)
    for p in network.parameters():  # gates and output layers start at zero, which would hide the conditions
        if p.ndim > 1:
            nn.init.normal_(p, std=0.1)
    return denoiser_from_diffusers(network, scheduler, null=null_of(name, cond())), cond()


def null_of(name: str, cond: dict[str, Tensor]) -> dict[str, Any] | None:
    if "label" in cond:
        return {"label": 3} if name == "unet" else None
    return {k: torch.zeros_like(v[0]) for k, v in cond.items()}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Denoiser, dict[str, Tensor]]:
    return request.param, *build(request.param)


def test_every_family_answers_in_the_shape_of_its_input(family: tuple[str, Denoiser, dict[str, Tensor]]) -> None:
    name, denoiser, cond = family
    config = FAMILIES[name][1]
    assert denoiser.shape == (config["in_channels"], 8, 8)
    x, t = torch.randn(3, *denoiser.shape), torch.full((3,), 0.5 * denoiser.process.t_max)
    answer = denoiser(x, t, cond)
    for view in (answer.x0, answer.eps, answer.v, answer.score):
        assert view.shape == x.shape
        assert bool(torch.isfinite(view).all())


def test_conditions_reach_the_network_row_by_row(family: tuple[str, Denoiser, dict[str, Tensor]]) -> None:
    name, denoiser, cond = family
    denoiser.eval()
    x, t = torch.randn(1, *denoiser.shape).expand(3, -1, -1, -1), torch.full((3,), 0.5 * denoiser.process.t_max)
    value = denoiser(x, t, cond).value
    assert not torch.allclose(value[0], value[1], atol=1e-5), f"{name} ignores its condition"
    alone = denoiser(x[1:2], t[1:2], {k: v[1:2] for k, v in cond.items()}).value
    torch.testing.assert_close(alone[0], value[1], rtol=1e-4, atol=1e-4)
    later = denoiser(x, 1.5 * t, cond).value
    assert not torch.allclose(later, value, atol=1e-5), f"{name} ignores the time"


def test_guidance_works_with_the_null_value(family: tuple[str, Denoiser, dict[str, Tensor]]) -> None:
    _, denoiser, cond = family
    denoiser.eval()
    x, t = torch.randn(3, *denoiser.shape), torch.full((3,), 0.5 * denoiser.process.t_max)
    with_cond, without = denoiser(x, t, cond).value, denoiser(x, t, cond, 0.0).value
    torch.testing.assert_close(denoiser(x, t, cond, 2.0).value, 2 * with_cond - without, rtol=1e-3, atol=1e-3)


def test_in_train_mode_two_calls_agree(family: tuple[str, Denoiser, dict[str, Tensor]]) -> None:
    """diffusers would drop labels at random in train mode; which labels are dropped is the turn's choice here."""
    _, denoiser, cond = family
    denoiser.train()
    x = torch.randn(3, *denoiser.shape)
    first = denoiser(x, 0.3 * denoiser.process.t_max, cond).value
    assert all(torch.equal(denoiser(x, 0.3 * denoiser.process.t_max, cond).value, first) for _ in range(8))


def test_a_learned_variance_is_dropped() -> None:
    denoiser, cond = build("dit")
    assert denoiser.network.config["out_channels"] == 2 * denoiser.shape[0]  # type: ignore[index]
    raw = denoiser.network(torch.zeros(3, 2, 8, 8), timestep=torch.ones(3), class_labels=cond["label"]).sample
    torch.testing.assert_close(denoiser(torch.zeros(3, 2, 8, 8), 1.0, cond).value, raw[:, :2])


def test_networks_are_fed_the_time_that_they_were_trained_with() -> None:
    seen = []
    for name, fraction in (("sd3", 0.25), ("dit", 0.25)):
        denoiser, cond = build(name)
        denoiser.network.register_forward_pre_hook(lambda _m, _a, k: seen.append(k["timestep"]), with_kwargs=True)
        denoiser(torch.zeros(3, *denoiser.shape), fraction * denoiser.process.t_max, cond)
    torch.testing.assert_close(seen[0], torch.full((3,), 250.0))
    torch.testing.assert_close(seen[1], torch.full((3,), 0.25 * 999))


def test_gan_features_come_from_the_image_and_let_gradients_through(
    family: tuple[str, Denoiser, dict[str, Tensor]],
) -> None:
    """The discriminator must see the sample: one logit or token per place, changing with x, with gradient to x."""
    name, denoiser, cond = family
    denoiser.eval()
    discriminator = Discriminator(denoiser)
    x = torch.randn(3, *denoiser.shape, requires_grad=True)
    t = torch.full((3,), 0.5 * denoiser.process.t_max)
    prediction, logits = discriminator(denoiser, x, t, cond)
    assert logits.shape[0] == 3
    assert logits.shape[1] in (4 * 4, 8 * 8), f"{name}: {logits.shape[1]} logits are not one per place of the image"
    torch.testing.assert_close(prediction.value, denoiser(x, t, cond).value)
    gradient = torch.autograd.grad(logits.sum(), x)[0]
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


def test_logits_alone_are_those_of_the_whole_pass_to_the_last_bit(
    family: tuple[str, Denoiser, dict[str, Tensor]],
) -> None:
    _, denoiser, cond = family
    discriminator = Discriminator(denoiser)
    trained = [*denoiser.parameters(), *discriminator.parameters()]
    t = torch.full((3,), 0.5 * denoiser.process.t_max)
    torch.manual_seed(0)
    noise, found, flops = torch.randn(3, *denoiser.shape), [], []
    for ask in (lambda x: discriminator(denoiser, x, t, cond)[1], lambda x: discriminator.logits(denoiser, x, t, cond)):
        x = noise.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            logits = ask(x)
        flops.append(counter.get_total_flops())
        found.append([logits, *torch.autograd.grad(logits.sum(), [x, *trained], allow_unused=True)])
    assert flops[1] < flops[0]
    for whole, early in zip(*found, strict=True):
        assert (whole is None) == (early is None)
        assert whole is None or torch.equal(whole, early)


def test_a_discriminator_taps_a_network_once_and_its_copies_leave_that_network_alone() -> None:
    denoiser, cond = build("dit")
    discriminator = Discriminator(denoiser)
    block = denoiser.network.get_submodule(discriminator.path)
    x, t = torch.randn(3, *denoiser.shape), torch.full((3,), 500.0)
    expected = discriminator(denoiser, x, t, cond)[1]
    assert len(block._forward_hooks) == 1
    with torch.no_grad():
        copied = copy.deepcopy(nn.ModuleList([discriminator, denoiser]))
    assert len(block._forward_hooks) == 1
    torch.testing.assert_close(copied[0](copied[1], x, t, cond)[1], expected)  # type: ignore[operator]
    other, _ = build("dit")
    discriminator.logits(other, x, t, cond)
    torch.testing.assert_close(discriminator.logits(denoiser, x, t, cond), expected)
    assert copy.deepcopy(discriminator).state_dict().keys() == discriminator.state_dict().keys()


def test_the_middle_is_a_whole_block(family: tuple[str, Denoiser, dict[str, Tensor]]) -> None:
    name, denoiser, _ = family
    path = middle_block(denoiser.network)
    assert path == ("mid_block" if name.startswith("unet") else "transformer_blocks.1")


def test_the_middle_of_a_shallow_transformer_is_still_a_block() -> None:
    class_name, config, _, _ = FAMILIES["dit"]
    assert middle_block(make_network(class_name, config | {"num_layers": 2})) == "transformer_blocks.1"


def test_a_discriminator_on_a_network_without_its_null_conditions_says_so() -> None:
    class_name, config, scheduler, _ = FAMILIES["unet-text"]
    denoiser = denoiser_from_diffusers(make_network(class_name, config), scheduler)
    with pytest.raises(UserError, match=r"UNet2DConditionModel.*encoder_hidden_states") as error:
        Discriminator(denoiser)
    assert "null" in (error.value.cure or "")
    assert "gan_weight=0" in (error.value.cure or "")


def test_taps_read_any_module_and_leave_no_hook() -> None:
    denoiser, cond = build("dit")
    with Taps(denoiser.network, ["transformer_blocks.0"]) as taps, taps.recording() as features:
        denoiser(torch.zeros(3, 2, 8, 8), 1.0, cond)
    assert as_tokens(features["transformer_blocks.0"]).shape == (3, 16, 16)
    denoiser(torch.zeros(3, 2, 8, 8), 1.0, cond)
    assert len(features.calls("transformer_blocks.0")) == 1
    assert feature_width(denoiser, block_taps(denoiser.network, "transformer_blocks.0")) == 16
    with pytest.raises(UserError, match="did you mean 'transformer_blocks"):
        block_taps(denoiser.network, "transformer_block.0")


def test_tokens_of_maps_and_vectors() -> None:
    maps = torch.arange(24.0).reshape(1, 2, 3, 4)
    torch.testing.assert_close(as_tokens(maps)[0, 5], maps[0, :, 1, 1])
    assert as_tokens(torch.ones(2, 7)).shape == (2, 1, 7)
    with pytest.raises(UserError, match="no list of blocks"):
        middle_block(nn.Linear(2, 2))


def test_a_class_conditional_dit_finds_its_null_label() -> None:
    assert build("dit")[0].null == {"label": 5}


def test_a_unet_s_null_label_is_not_guessed() -> None:
    class_name, config, scheduler, cond = FAMILIES["unet"]
    denoiser = denoiser_from_diffusers(make_network(class_name, config), scheduler)
    x, t = torch.randn(3, *denoiser.shape), torch.full((3,), 100.0)
    assert denoiser(x, t, cond()).value.shape == x.shape
    with pytest.raises(UserError, match=r"unconditional value for: label.*stillroom\.json"):
        denoiser(x, t, cond(), 2.0)
    assert Discriminator(denoiser).logits(denoiser, x, t, cond()).shape[0] == 3  # which asks for no such label


def test_conditions_that_a_network_does_not_take_are_named() -> None:
    denoiser, _ = build("dit")
    with pytest.raises(UserError, match=r"DiTTransformer2DModel takes no condition 'prompt'.*class_labels"):
        denoiser(torch.zeros(1, 2, 8, 8), 1.0, {"prompt": torch.ones(1)})


@pytest.mark.parametrize(
    "process",
    [
        RectifiedFlow(3.0), EDM(0.01, 50.0, 0.4, 5.0), VP("squaredcos_cap_v2", 500), VP(zero_snr=True),
        VP("trained", 4, betas=(0.1, 0.2, 0.3, 0.4)), VP("trained", 4, betas=(0.1, 0.2, 0.3, 1.0), zero_snr=True),
    ],
)  # fmt: skip
def test_a_process_survives_diffusers_scheduler_config(process: Any) -> None:
    kinds = {"edm": ["edm"], "vp": ["eps", "v", "x0"]}.get(process.name, ["v"])
    kinds = kinds[1:] if getattr(process, "zero_snr", False) else kinds
    for kind in kinds:
        assert process_from_scheduler(scheduler_config(process, kind)) == (process, kind)


@pytest.mark.parametrize(
    ("name", "changes", "process", "kind"),
    [
        ("DDPMScheduler", {}, VP("linear", 1000, 1e-4, 0.02), "eps"),
        ("PNDMScheduler", SD, VP(), "eps"),
        ("EulerDiscreteScheduler", SD | {"prediction_type": "v_prediction"}, VP(), "v"),
        ("DPMSolverMultistepScheduler",
         {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
         RectifiedFlow(3.0), "v"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}, RectifiedFlow(2.0), "v"),
        ("EDMEulerScheduler", {"sigma_max": 70.0}, EDM(sigma_max=70.0), "edm"),
    ],
)  # fmt: skip
def test_diffusers_own_schedulers_are_read(name: str, changes: dict[str, Any], process: Any, kind: str) -> None:
    import diffusers

    changes = {k: v for k, v in changes.items() if k != "_class_name"}
    config = dict(getattr(diffusers, name)(**changes).config) | {"_class_name": name}
    assert process_from_scheduler(config) == (process, kind)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beta_schedule": "sigmoid"}, "cannot build the scheduler DDIMScheduler.*sigmoid"),
        ({"num_train_timesteps": "many"}, "cannot build"),
        ({"beta_end": 2.0}, "betas of no noise schedule"),
        ({"_class_name": ["my_code", "Scheduler"]}, "no scheduler"),
        ({"_class_name": "UNet2DModel"}, "no scheduler 'UNet2DModel'"),
        ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "no discrete noise schedule"),
        (FLOW | {"invert_sigmas": True}, "invert_sigmas"),
        (FLOW | {"num_train_timesteps": 500}, "500 num_train_timesteps"),
        (FLOW | {"shift": -1.0}, r"shift -1\.0"),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, "use_flow_sigmas False"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "'epsilon' and use_flow_sigmas True"),
        ({"prediction_type": "noise"}, "noise"),
        ({"trained_betas": [0.1]}, "betas of no noise schedule"),
        ({"rescale_betas_zero_snr": True}, "zero SNR.*noise says nothing"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 1.0,
          "prediction_type": "v_prediction"}, "v_prediction"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_schedulers_that_would_be_read_wrongly_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        process_from_scheduler(SD | changes)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDPMScheduler"},
        {"_class_name": "LCMScheduler", "num_train_timesteps": 1000},  # scaled_linear by default, not linear
        {"_class_name": "TCDScheduler"},
        {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "written_by": "another version"},
        {"_class_name": "DDPMScheduler", "num_train_timesteps": 500},
        {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
        {"_class_name": "DDPMScheduler", "num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 0.4]},
        {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "sample",
         "beta_schedule": "sigmoid"},
        {"_class_name": "EulerDiscreteScheduler", **{k: v for k, v in SD.items() if k.startswith("beta")},
         "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        # a class that does not know the key draws without it
        {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=lambda config: "-".join(map(str, config.values()))[:60],
)  # fmt: skip
def test_noise_rates_are_those_that_the_class_itself_computes(config: dict[str, Any]) -> None:
    import diffusers

    process, _ = process_from_scheduler(config)
    assert isinstance(process, VP)
    given = {k: v for k, v in config.items() if k != "_class_name"}
    theirs = getattr(diffusers, config["_class_name"]).from_config(given).alphas_cumprod.double()
    assert process.steps == len(theirs)
    ours = process.alpha(torch.arange(process.steps, dtype=torch.float64)) ** 2
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_what_a_config_leaves_out_is_its_class_s_own_default() -> None:
    assert process_from_scheduler({"_class_name": "EDMEulerScheduler"}) == (EDM(0.002, 80.0, 0.5, 7.0), "edm")
    assert process_from_scheduler({"_class_name": "DDPMScheduler"}) == (VP("linear", 1000, 1e-4, 0.02), "eps")
    assert process_from_scheduler({"_class_name": "LCMScheduler"}) == (VP(), "eps")
    assert process_from_scheduler({"_class_name": "DDPMScheduler", "predict_epsilon": False})[1] == "x0"


def test_what_cannot_be_built_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="NoSuchModel"):
        make_network("NoSuchModel", {})
    with pytest.raises(UserError, match="sample_size"):
        denoiser_from_diffusers(nn.Linear(2, 2), FLOW)
    with pytest.raises(UserError, match="trigflow"):
        scheduler_config(TrigFlow(), "v")
