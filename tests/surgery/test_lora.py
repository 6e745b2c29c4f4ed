"""LoRA roles: many voices, one copy of the weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.sampling import ODESampler
from stillroom.errors import UserError
from stillroom.folders.denoisers import load_denoiser
from stillroom.folders.weights import read_tensors
from stillroom.method import Method, frozen
from stillroom.surgery.lora import LoraDenoiser, lora_role, plain_copy
from stillroom.surgery.modules import parameter_count
from stillroom.tasks.class_images.model import ImageGenerator
from tiny_denoisers import ask, dit_teacher, point_teacher, train

TARGETS = ("to_q", "to_v")


def targets_of(denoiser: Denoiser) -> list[str]:
    """Ends of the names of the modules with an adapter."""
    return [name.rsplit(".", 1)[-1] for name, m in denoiser.network.named_modules() if isinstance(m, LoraLayer)]


TEACHERS = {"point": point_teacher, "dit": dit_teacher}


@pytest.fixture(params=TEACHERS)
def teacher(request: pytest.FixtureRequest) -> Denoiser:
    return frozen(TEACHERS[request.param]())


def test_what_is_used_of_peft_is_there() -> None:
    """Private fields of its layers, and the names of their parts: pyproject.toml bounds its version for them."""
    network = inject_adapter_in_model(
        LoraConfig(r=1, target_modules=["0"]), nn.Sequential(nn.Linear(3, 2)), adapter_name="student"
    )
    layer: Any = network[0]
    assert isinstance(layer, LoraLayer)
    for off in (True, False):
        layer._disable_adapters = off
        assert layer.disable_adapters == off
    layer._active_adapter = ["student"]
    assert layer.active_adapters == ["student"]
    parts = {"0.base_layer.weight", "0.base_layer.bias", "0.lora_A.student.weight", "0.lora_B.student.weight"}
    assert {name for name, _ in network.named_parameters()} == parts
    assert isinstance(layer.get_base_layer(), nn.Linear)
    assert layer.get_delta_weight("student").shape == (2, 3)


def test_a_new_role_says_what_the_teacher_says(teacher: Denoiser) -> None:
    before = ask(teacher)
    role = lora_role(teacher, "student", rank=4)
    assert torch.equal(ask(role), before)
    assert torch.equal(ask(teacher), before)


def test_training_a_role_changes_that_role_alone(teacher: Denoiser) -> None:
    before = ask(teacher)
    first, second = lora_role(teacher, "student", rank=4), lora_role(teacher, "fake", rank=2)
    train(first)
    assert not torch.allclose(ask(first), before, atol=1e-4)
    assert torch.equal(ask(teacher), before)
    assert torch.equal(ask(second), before)
    kept = ask(first)
    train(second, steps=5)
    assert not torch.allclose(ask(second), before, atol=1e-4)
    assert torch.equal(ask(first), kept)
    assert torch.equal(ask(teacher), before)


def test_a_role_may_be_added_after_another_was_trained_and_on_other_modules(teacher: Denoiser) -> None:
    first = lora_role(teacher, "student", rank=2, targets=("to_q",))
    train(first)
    kept, before = ask(first), ask(teacher)
    second = lora_role(teacher, "fake", rank=2, targets=("to_v",))
    assert torch.equal(ask(second), before)
    assert torch.equal(ask(first), kept)
    train(second)
    assert torch.equal(ask(first), kept)


@pytest.mark.parametrize(("targets", "words"), [((), "no LoRA targets are named"), (("",), "LoRA target '' names no")])
def test_no_targets_are_refused_and_some_are_named(teacher: Denoiser, targets: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=rf"{words}.*set targets to endings of its layers, for example"):
        lora_role(teacher, "fake", rank=2, targets=targets)


def test_roles_share_one_copy_of_the_base_weights_and_own_only_their_adapters(teacher: Denoiser) -> None:
    base = {id(p) for p in teacher.parameters()}
    first, second = lora_role(teacher, "student", rank=4), lora_role(teacher, "fake", rank=4)
    assert first.network is teacher.network
    assert base <= {id(p) for p in first.parameters()}
    own, other = first.role_parameters(), second.role_parameters()
    assert own
    assert not {id(p) for p in own.values()} & {id(p) for p in other.values()}
    assert not {id(p) for p in own.values()} & base
    assert sum(p.numel() for p in own.values()) < sum(p.numel() for p in teacher.parameters()) / 2


def test_an_adapter_costs_its_rank_and_nothing_else() -> None:
    """Blocks of 16 -> 16 with two targets each, three blocks: rank * (16 + 16) numbers per target."""
    teacher = frozen(point_teacher())
    before = parameter_count(teacher)
    added = 0
    for role, rank in (("student", 4), ("fake", 2)):
        own = lora_role(teacher, role, rank=rank).role_parameters()
        added += 3 * 2 * rank * 32
        assert sum(p.numel() for p in own.values()) == 3 * 2 * rank * 32
        assert parameter_count(teacher) == before + added


def test_gradients_of_a_role_reach_only_its_adapter(teacher: Denoiser) -> None:
    first, second = lora_role(teacher, "student", rank=4), lora_role(teacher, "fake", rank=4)
    teacher.network.requires_grad_(False)
    for p in first.role_parameters().values():
        p.requires_grad_(True)
    ask(first).square().mean().backward()
    assert all(p.grad is not None for p in first.role_parameters().values())
    assert all(p.grad is None for p in second.role_parameters().values())
    named = teacher.network.named_parameters()
    assert all(p.grad is None for n, p in named if ".student." not in n)


def test_adding_a_role_leaves_the_base_as_frozen_or_trainable_as_it_was() -> None:
    for make in TEACHERS.values():
        for freeze in (True, False):
            teacher = make()
            if freeze:
                frozen(teacher)
            before = {id(p): p.requires_grad for p in teacher.parameters()}
            role = lora_role(teacher, "student", rank=2)
            lora_role(teacher, "fake", rank=2)
            assert {id(p): p.requires_grad for p in teacher.parameters() if id(p) in before} == before
            assert all(p.requires_grad for p in role.role_parameters().values())


def test_merging_gives_an_ordinary_network_that_says_the_same(teacher: Denoiser) -> None:
    names = [n for n, _ in teacher.network.named_parameters()]
    before = ask(teacher)
    first, second = lora_role(teacher, "student", rank=4, alpha=8.0), lora_role(teacher, "fake", rank=2)
    train(first)
    train(second)
    merged = first.merged()
    assert type(merged) is Denoiser
    torch.testing.assert_close(ask(merged), ask(first), rtol=1e-5, atol=1e-5)
    assert [n for n, _ in merged.network.named_parameters()] == names
    assert not hasattr(merged.network, "lora_switch")
    assert not any(isinstance(module, BaseTunerLayer) for module in merged.network.modules())
    assert torch.equal(ask(plain_copy(teacher)), before)
    shared = first.merged(share=True)
    assert all(torch.equal(p, q) for p, q in zip(shared.network.parameters(), merged.network.parameters(), strict=True))
    own = {p.data_ptr() for p in teacher.network.parameters()}
    changed = [name for name, p in shared.network.named_parameters() if p.data_ptr() not in own]
    assert changed  # the weights that the adapter changes, and no others
    assert all(name.rpartition(".")[0].endswith(tuple(targets_of(first))) for name in changed)
    assert torch.equal(ask(teacher), before)  # merging made a copy


def test_a_deep_copy_of_a_role_speaks_for_itself(teacher: Denoiser) -> None:
    """The engine averages weights on copies."""
    role = lora_role(teacher, "student", rank=4)
    train(role)
    twin = copy.deepcopy(role)
    kept = ask(role)
    assert torch.equal(ask(twin), kept)
    train(twin)
    assert torch.equal(ask(role), kept)
    assert not torch.equal(ask(twin), kept)


def test_the_voice_returns_after_an_error(teacher: Denoiser) -> None:
    role = lora_role(teacher, "student", rank=4)
    train(role)
    before = ask(teacher)
    with pytest.raises(RuntimeError), role.adapter_scope():
        raise RuntimeError
    assert torch.equal(ask(teacher), before)
    with role.adapter_scope():  # teacher asked while a role speaks, as in a nested call
        assert torch.equal(ask(teacher), before)


def test_alpha_over_rank_scales_the_adapter() -> None:
    shifts = []
    for alpha in (4.0, 8.0):
        teacher = frozen(point_teacher())
        role = lora_role(teacher, "student", rank=4, alpha=alpha, targets=("out",))
        torch.manual_seed(0)
        for p in role.role_parameters().values():
            nn.init.normal_(p)
        shifts.append(ask(role) - ask(teacher))
    torch.testing.assert_close(shifts[1], 2 * shifts[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("speaker", ["student", "fake", None])
def test_recomputed_activations_speak_with_the_voice_of_the_forward_pass(speaker: str | None) -> None:
    """Backward runs long after the turn asked other roles of the same network."""

    def gradients(checkpointed: bool) -> list[Tensor]:
        teacher = frozen(dit_teacher())
        roles = {name: lora_role(teacher, name, rank=4) for name in ("student", "fake")}
        torch.manual_seed(1)
        for role in roles.values():
            for p in role.role_parameters().values():
                nn.init.normal_(p, std=0.3)
        if checkpointed:
            teacher.network.enable_gradient_checkpointing(roles["fake"].checkpoint_function)  # type: ignore[operator]
            teacher.network.train()
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        label = {"label": torch.tensor([0, 1, 2, 3])}
        asked = roles[speaker] if speaker else teacher
        value = asked(x, 0.5, label).value
        for other in (teacher, *roles.values()):
            other(x.detach(), 0.3, label)
        wanted = [x, *(asked.role_parameters().values() if speaker else ())]  # type: ignore[operator]
        return list(torch.autograd.grad(value.square().sum(), wanted))

    plain, recomputed = gradients(False), gradients(True)
    for a, b in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_block_recomputed_by_hand_speaks_with_the_voice_of_the_forward_pass() -> None:
    """The switch's own checkpoint, with another voice still speaking at backward time."""
    teacher = frozen(point_teacher())
    roles = {name: lora_role(teacher, name, rank=4) for name in ("student", "fake")}
    torch.manual_seed(1)
    for role in roles.values():
        for p in role.role_parameters().values():
            nn.init.normal_(p, std=0.3)
    block, switch = teacher.network.blocks[1], teacher.network.lora_switch  # type: ignore[index,union-attr]
    h, gradients = torch.randn(4, 16, requires_grad=True), []
    for checkpointed in (False, True):
        with switch.use("student"):
            out = switch.checkpoint(block, h) if checkpointed else block(h)
        with switch.use("fake"):
            own = [p for n, p in block.named_parameters() if ".student." in n]
            gradients.append(torch.autograd.grad(out.square().sum(), [h, *own]))
            assert switch.active == "fake"
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_saved_adapter_student_is_a_folder_of_plain_weights(kind: str, tmp_path: Path) -> None:
    teacher = frozen(TEACHERS[kind]())
    names = set(teacher.network.state_dict())
    role = lora_role(teacher, "student", rank=4)
    train(role)
    ImageGenerator(role, ODESampler()).save(tmp_path)
    (weights,) = tmp_path.rglob("*.safetensors")
    assert set(read_tensors(weights)) == names
    back = load_denoiser(tmp_path)
    assert type(back) is Denoiser
    torch.testing.assert_close(ask(back), ask(role), rtol=1e-5, atol=1e-5)


def test_targets_that_name_nothing_are_refused_with_the_nearest(teacher: Denoiser) -> None:
    with pytest.raises(UserError, match=r"to_vv.*did you mean"):
        lora_role(teacher, "student", targets=("to_q", "to_vv"))
    assert not hasattr(teacher.network, "lora_switch")


class TwoRoles(Method):
    slug = "two"

    def build(self, teacher: Denoiser) -> None:
        self.teacher = frozen(teacher)
        self.student = self.clone(teacher, "student")
        self.fake = self.clone(teacher, "fake")


@pytest.mark.parametrize("lora", [("student", "fake"), ("student",), ("fake",), ()])
def test_a_recipe_decides_which_roles_are_adapters(lora: tuple[str, ...], teacher: Denoiser) -> None:
    method = TwoRoles(lora={role: {"rank": 2, "targets": TARGETS} for role in lora})
    before = ask(teacher)
    method.build(teacher)
    for role in ("student", "fake"):
        network = method.role(role)
        assert torch.equal(ask(network), before)  # type: ignore[arg-type]
        assert isinstance(network, LoraDenoiser) == (role in lora)
        own = method.trained_parameters(role)
        assert all("lora" in name for name in own) == (role in lora)
        with torch.no_grad():
            for p in own.values():
                p.add_(0.1)
        assert not torch.equal(ask(network), before)  # type: ignore[arg-type]
        assert torch.equal(ask(method.teacher), before)
    method.train()
    assert not any(m.training for m in method.teacher.modules())


def test_a_target_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"'net\.9'.*to_q.*options\.targets, or lora\.fake\.targets"):
        lora_role(dit_teacher(), "fake", 2, targets=["net.9"])
