"""Taps on transformers' own classes and on plain modules: they read what the networks themselves report, leave no
trace, and survive checkpointing, compilation, DDP and FSDP2."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from stillroom.errors import UserError
from stillroom.losses.features import relation
from stillroom.networks.projectors import Projectors
from stillroom.surgery.taps import Tap, Taps, block_paths, module_paths, split_heads
from tiny_models import CLASSIFIERS, TEXTS, make_model
from workers.tapped import Stack

WORKERS = Path(__file__).parents[1] / "workers"
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32
}  # fmt: skip
IMAGES: dict[str, Any] = {"image_size": 8, "patch_size": 4}
IDS = torch.arange(10).reshape(2, 5)


def family(name: str, attention: str = "eager") -> tuple[PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    own: dict[str, Any] = {"attn_implementation": attention}
    if name == "bert":
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
        return BertModel(BertConfig(**SMALL, vocab_size=20, **own)).eval(), {"input_ids": IDS, "attention_mask": mask}
    if name == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=20, n_positions=8, **own)
        return GPT2Model(config).eval(), {"input_ids": IDS}
    if name == "t5":
        config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, vocab_size=20, **own)
        return T5Model(config).eval(), {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "vit":
        return ViTModel(ViTConfig(**SMALL, **IMAGES, **own)).eval(), pixels
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(**SMALL, **IMAGES, **decoder, decoder_intermediate_size=16, mask_ratio=0.5, **own)
    return ViTMAEForPreTraining(config).eval(), {**pixels, "noise": torch.rand(2, 4)}


BLOCKS = {"bert": "", "gpt2": "", "vit": "", "vitmae": "vit", "t5": "encoder"}
ATTENTION = {"bert": ".attention.self", "gpt2": ".attn", "vit": ".attention", "vitmae": ".attention", "t5": ".layer.0"}


# --- parity with what the networks report -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", BLOCKS)
def test_hidden_states_and_attentions_are_the_networks_own(name: str) -> None:
    network, inputs = family(name)
    blocks = block_paths(network, BLOCKS[name])
    assert len(blocks) == 3
    with torch.no_grad():
        own = network(**inputs, output_hidden_states=True, output_attentions=True)
        taps = Taps(
            network,
            {f"in{i}": Tap(path, "input") for i, path in enumerate(blocks)}
            | {f"out{i}": Tap(path) for i, path in enumerate(blocks)}
            | {f"map{i}": Tap(path + ATTENTION[name], "attention") for i, path in enumerate(blocks)},
        )
        output, features = taps(**inputs)
    hidden = own.encoder_hidden_states if name == "t5" else own.hidden_states
    maps = own.encoder_attentions if name == "t5" else own.attentions
    assert len(maps) == 3
    for i in range(3):
        torch.testing.assert_close(features[f"in{i}"], hidden[i], rtol=0, atol=0)
        torch.testing.assert_close(features[f"map{i}"], maps[i], rtol=0, atol=0)
        if i < 2:  # the last state that networks report has gone through their final norm
            torch.testing.assert_close(features[f"out{i}"], hidden[i + 1], rtol=0, atol=0)
    for key, value in own.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(output[key], value, rtol=0, atol=0)


def test_queries_and_keys_make_the_attention_map() -> None:
    network, inputs = family("vit")
    at = "layers.1.attention"
    _, features = Taps(network, {"q": f"{at}.q_proj", "k": f"{at}.k_proj", "map": Tap(at, "attention")})(**inputs)
    scores = relation(split_heads(features["q"], 2), split_heads(features["k"], 2))
    torch.testing.assert_close(scores.softmax(-1), features["map"])
    assert relation(split_heads(features["q"], 8), split_heads(features["k"], 8)).shape == (2, 8, 5, 5)


def test_parts_of_a_fused_projection() -> None:
    network, inputs = family("gpt2")
    names = {"q": (0, 3), "k": (1, 3), "v": (2, 3)}
    taps = Taps(
        network, {n: Tap("h.0.attn.c_attn", part=part) for n, part in names.items()} | {"all": "h.0.attn.c_attn"}
    )
    _, features = taps(**inputs)
    torch.testing.assert_close(torch.cat([features[n] for n in "qkv"], -1), features["all"])
    with pytest.raises(UserError, match="does not exist"):
        Taps(network, [Tap("h.0.attn.c_attn", part=(0, 7))])(**inputs)


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_fused_attention_has_no_map_and_says_what_to_do(name: str) -> None:
    network, inputs = family(name, "sdpa")
    taps = Taps(network, {"map": Tap(block_paths(network, BLOCKS[name])[0] + ATTENTION[name], "attention")})
    with pytest.raises(UserError, match="no attention map") as error:
        taps(**inputs)
    assert "eager" in error.value.cure
    network.set_attn_implementation("eager")
    assert taps(**inputs)[1]["map"].ndim == 4


def test_ffn_input_is_the_norm_before_it() -> None:
    network, inputs = family("vit")
    _, features = Taps(network, {"norm": "layers.0.layernorm_after", "ffn": Tap("layers.0.mlp", "input")})(**inputs)
    assert features["ffn"] is features["norm"]


ONE = {"num_hidden_layers": 1, "n_layers": 1, "n_layer": 1}


@pytest.mark.parametrize("name", [*(name for name in TEXTS if name != "albert"), "vit", "deit", "beit", "dinov2"])
def test_one_block_is_a_list_of_blocks(name: str) -> None:
    made = TEXTS[name] if name in TEXTS else CLASSIFIERS[name]
    settings = {"num_hidden_layers": 2, **made.settings}
    if name in ("distilbert", "gpt2"):
        del settings["num_hidden_layers"]
    two = block_paths(make_model(made._replace(settings=settings)))
    one = make_model(made._replace(settings={**settings, **{key: 1 for key in ONE if key in settings}}))
    assert block_paths(one) == two[:1]


def test_a_list_inside_the_one_block_is_no_list_of_blocks() -> None:
    from diffusers import DiTTransformer2DModel

    network: Any = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=4, sample_size=4, patch_size=2, in_channels=1,
        out_channels=1, norm_num_groups=2,
    )  # fmt: skip
    assert [len(m) for m in network.modules() if isinstance(m, nn.ModuleList)] == [1, 2, 3]
    assert block_paths(network) == ["transformer_blocks.0"]
    stacks = nn.ModuleDict({"stacks": nn.ModuleList([nn.ModuleDict({"blocks": Stack().blocks})])})
    assert block_paths(stacks) == [f"stacks.0.blocks.{i}" for i in range(4)]


# --- plain modules ----------------------------------------------------------------------------------------------------
def test_a_wrong_path_names_the_nearest_and_leaves_no_hook() -> None:
    network = Stack()
    with pytest.raises(UserError, match=r"'block\.2'.*'blocks\.2' or 'blocks"):
        Taps(network, ["blocks.1", "block.2"])
    assert not network.blocks[1]._forward_hooks
    with pytest.raises(UserError, match="one name each"):
        Taps(network, ["blocks.1", Tap("blocks.1", "input")])
    with pytest.raises(UserError, match="list of blocks under 'block'"):
        block_paths(network, "block")


def test_hooks_come_off_and_names_of_weights_stay() -> None:
    network = Stack()
    keys = list(network.state_dict())
    with Taps(network, {"a": "blocks.0", "b": Tap("blocks.0", "input")}) as taps:
        assert list(network.state_dict()) == keys
        assert isinstance(taps(torch.ones(1, 4))[1]["a"], Tensor)
    assert not network.blocks[0]._forward_hooks
    assert not network.blocks[0]._forward_pre_hooks
    _, features = taps(torch.ones(1, 4))
    with pytest.raises(UserError, match="reached 0 times"):
        features["a"]


def test_nothing_is_read_outside_a_recording_and_nothing_is_held_after_it() -> None:
    network = Stack()
    taps = Taps(network, ["blocks.1"])
    network(torch.ones(2, 4))
    output, features = taps(torch.ones(2, 4))
    assert features["blocks.1"].requires_grad
    held = weakref.ref(features["blocks.1"])
    del output, features
    gc.collect()
    assert held() is None
    with torch.no_grad():
        _, features = taps(torch.ones(2, 4))
    assert features["blocks.1"].grad_fn is None
    assert len(features) == 1


def test_two_runs_are_two_calls_and_names_are_checked() -> None:
    network = Stack()
    taps = Taps(network, ["blocks.1"])
    with taps.recording() as features:
        network(torch.ones(2, 4))
        network(torch.zeros(2, 4))
    assert [t.shape for t in features.calls("blocks.1")] == [(2, 4), (2, 4)]
    with pytest.raises(UserError, match="reached 2 times"):
        features["blocks.1"]
    with pytest.raises(UserError, match=r"did you mean 'blocks\.1'"):
        features["block.1"]


def test_a_failed_pass_closes_its_recording() -> None:
    network = Stack()
    taps = Taps(network, ["blocks.0"], early_exit=True)
    with pytest.raises(RuntimeError):
        taps(torch.ones(2, 3))
    network(torch.ones(2, 4))  # no recording is open: no early exit
    assert all(block.runs > 0 for block in network.blocks[1:])


def test_a_copy_of_a_tapped_network_is_not_read() -> None:
    network = Stack()
    taps = Taps(network, ["blocks.0"])
    student = copy.deepcopy(network)
    with taps.recording() as features:
        network(torch.ones(1, 4))
        student(torch.ones(1, 4))
    assert len(features.calls("blocks.0")) == 1


def test_items_by_position_and_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x, scale=2 * x)[0]

    class Pair(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, None]:
            return x, x + scale, None

    x = torch.ones(1, 2)
    taps = {
        "first": Tap("part"), "second": Tap("part", item=1), "last": Tap("part", item="last"),
        "scale": Tap("part", "input", "scale"), "by position": Tap("part", "input", 1),
    }  # fmt: skip
    _, found = Taps(Two(), taps)(x)
    values = {name: float(found[name][0, 0]) for name in found}
    assert values == {"first": 1, "second": 3, "last": 3, "scale": 2, "by position": 2}
    for wrong in (Tap("part", item=2), Tap("part", item=9), Tap("part", "input", "scal"), Tap("part", "input", 4)):
        with pytest.raises(UserError, match="not a tensor"):
            Taps(Two(), {"x": wrong})(x)


# --- early exit and shapes --------------------------------------------------------------------------------------------
def test_early_exit_runs_nothing_after_the_last_tap() -> None:
    network = Stack()
    x = torch.randn(2, 4)
    _, full = Taps(network, ["blocks.0", "blocks.1"])(x)
    for block in network.blocks:
        block.runs = 0
    output, features = Taps(network, ["blocks.0", "blocks.1"], early_exit=True)(x)
    assert output is None
    assert [block.runs for block in network.blocks] == [1, 1, 0, 0]
    torch.testing.assert_close(features["blocks.1"], full["blocks.1"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bert", "vitmae"])
def test_early_exit_leaves_transformers_classes_as_they_were(name: str) -> None:
    network, inputs = family(name)
    blocks = block_paths(network, BLOCKS[name])
    with torch.no_grad():
        before = network(**inputs, output_hidden_states=True)
        with Taps(network, [blocks[1]], early_exit=True) as taps:
            output, features = taps(**inputs, output_hidden_states=True)
        after = network(**inputs, output_hidden_states=True)
    assert output is None
    torch.testing.assert_close(features[blocks[1]], before.hidden_states[2], rtol=0, atol=0)
    assert len(after.hidden_states) == len(before.hidden_states) == 4
    for a, b in zip(after.hidden_states, before.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_shapes_make_projectors_and_leave_mode_and_random_state() -> None:
    student, teacher = nn.Sequential(Stack(4), nn.Dropout(0.5)), Stack(6)
    student[0].blocks[1].eval()
    state = torch.get_rng_state()
    student_shapes = Taps(student, ["0.blocks.1", "0.blocks.3"]).shapes(torch.zeros(1, 4))
    teacher_shapes = Taps(teacher, {"t": "blocks.2"}, early_exit=True).shapes(torch.zeros(1, 6))
    assert student_shapes == {"0.blocks.1": (1, 4), "0.blocks.3": (1, 4)}
    assert torch.equal(torch.get_rng_state(), state)
    assert student.training
    assert not student[0].blocks[1].training
    pairs = {"0.blocks.1": "t", "0.blocks.3": "t"}
    for kind, count in (("linear", 2), ("mlp", 4)):
        projectors = Projectors(student_shapes, teacher_shapes, pairs, kind)  # type: ignore[arg-type]
        assert projectors.project("0.blocks.3", torch.ones(2, 5, 4)).shape == (2, 5, 6)
        assert len(list(projectors.parameters())) == 2 * count
    with pytest.raises(UserError, match="4 channels, the teacher 6"):
        Projectors(student_shapes, teacher_shapes, pairs, "identity")
    with pytest.raises(UserError, match=r"did you mean '0\.blocks\.3'"):
        projectors.project("0.block.3", torch.ones(1, 4))
    with pytest.raises(UserError, match="the teacher has no tap"):
        Projectors(student_shapes, teacher_shapes, {"0.blocks.1": "u"})


# --- checkpointing ----------------------------------------------------------------------------------------------------
def gradients(network: nn.Module, x: Tensor, inside: bool = False) -> tuple[list[Tensor | None], int]:
    """Of a loss on a tap inside a block and on the output; the backward pass runs inside the recording or after it."""
    network.zero_grad()
    with Taps(network, {"inner": "blocks.1.inner", "block": "blocks.2"}) as taps, taps.recording() as features:
        output = network(x)
        loss = output.square().mean() + features["inner"].square().mean() + features["block"].abs().mean()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [p.grad for p in network.parameters()], len(features.calls("inner"))


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_counts_once_and_keeps_gradients(inside: bool) -> None:
    plain = Stack()
    checkpointed = Stack(reentrant=False)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4)
    expected, _ = gradients(plain, x)
    found, calls = gradients(checkpointed, x, inside)
    assert calls == 1
    assert checkpointed.blocks[1].runs == 2
    torch.testing.assert_close(found, expected)


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients() -> None:
    network = Stack(reentrant=True)
    x = torch.randn(3, 4, requires_grad=True)
    taps = Taps(network, ["blocks.1.inner"])
    with pytest.raises(UserError, match="ran without gradients"):
        taps(x)
    network.requires_grad_(False)
    assert not taps(x)[1]["blocks.1.inner"].requires_grad


def test_transformers_checkpointing_counts_once() -> None:
    network, inputs = family("vit")
    network.train()
    network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Taps(network, {"block": "layers.1", "ffn": "layers.1.mlp"}) as taps, taps.recording() as features:
        network(**inputs)
        (features["block"].square().mean() + features["ffn"].square().mean()).backward()
    assert len(features.calls("block")) == len(features.calls("ffn")) == 1
    gradient = network.get_parameter("layers.0.attention.q_proj.weight").grad
    assert gradient is not None
    assert float(gradient.abs().sum()) > 0


# --- compilation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("how", ["wrapped", "in place", "the caller", "the blocks"])
def test_compiled_networks_are_read_by_the_same_paths(how: str, early_exit: bool) -> None:
    torch.compiler.reset()
    network, x = Stack(), torch.randn(2, 4)
    _, expected = Taps(copy.deepcopy(network), ["blocks.1", "blocks.2.inner"])(x)
    compiled: Any = torch.compile(network, backend="eager") if how == "wrapped" else network
    taps = Taps(compiled, list(expected), early_exit)
    run = torch.compile(taps.__call__, backend="eager") if how == "the caller" else taps
    if how == "in place":
        network.compile(backend="eager")
    elif how == "the blocks":
        for block in network.blocks:
            block.compile(backend="eager")
    with dynamo_config.patch(skip_nnmodule_hook_guards=how != "the blocks"):
        for _ in range(2):
            _, features = run(x)
            for name in expected:
                torch.testing.assert_close(features[name], expected[name])
                assert features[name].requires_grad
    torch.compiler.reset()


def test_paths_do_not_show_wrappers() -> None:
    network = Stack()
    plain = set(module_paths(network))
    network.blocks[1] = torch.compile(network.blocks[1], backend="eager")  # type: ignore[assignment]
    assert set(module_paths(torch.compile(network, backend="eager"))) == plain  # type: ignore[arg-type]
    assert block_paths(network) == [f"blocks.{i}" for i in range(4)]


# --- two processes ----------------------------------------------------------------------------------------------------
def test_taps_under_ddp_and_fsdp2() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            WORKERS / "tapped.py",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split()) == ["ddp", "exit", "inner", "student"]
