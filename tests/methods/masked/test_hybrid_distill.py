"""Hybrid Distill: which patches stay, both terms against plain arithmetic, where the gradients go, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillroom as sr
from stillroom.data.source import ArrayData
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.evaluation.probes import attention_collapse, dense_probe, patch_targets
from stillroom.methods.masked.hybrid_distill import HybridDistill, with_class
from stillroom.networks.mae import encode, make_encoder
from stillroom.tasks.encode.model import ImageEncoder


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Student 48 x 4, a ViT of transformers 40 x 2, a masked autoencoder 96 x 6; 25 patches."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=20, patch_size=4,
        num_channels=1, initializer_range=0.2,
    )  # fmt: skip
    return make_encoder("mae-nano", 1, 20), ViTModel(config), make_encoder("mae-micro", 1, 20)


def data(n: int = 12) -> ArrayData:
    return ArrayData(torch.randn(n, 1, 20, 20, generator=torch.Generator().manual_seed(0)))


def built(**options: Any) -> HybridDistill:
    method = HybridDistill(HybridDistill.Options(**options))
    student, *teachers = networks()
    method.build(student, teachers)
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 4), 4)
    return method.eval()


def hiddens(network: Any, images: Tensor, kept: Tensor | None = None) -> list[Tensor]:
    """The input of each block, and the last output."""
    hidden = network.embeddings.patch_embeddings(images) + network.embeddings.position_embeddings[:, 1:]
    if kept is not None:
        hidden = torch.stack([h[k] for h, k in zip(hidden, kept, strict=True)])
    first = (network.embeddings.cls_token + network.embeddings.position_embeddings[:, :1]).expand(len(images), -1, -1)
    found = [torch.cat([first, hidden], 1)]
    for layer in network.layers:
        found.append(layer(found[-1]))
    return found


def scores(network: Any, states: list[Tensor], index: int, heads: int) -> Tensor:
    layer = network.layers[index]
    x = layer.layernorm_before(states[index])
    q, k = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (layer.attention.q_proj, layer.attention.k_proj))
    return q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5


# --- dropping ---------------------------------------------------------------------------------------------------------
def test_what_is_like_the_others_is_dropped_first() -> None:
    method = built(theta=0.5)
    tokens = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [5.0, -0.2], [0.0, 1.0], [0.3, 3.0]]])  # three alike, two apart
    assert method.least_redundant(tokens).tolist() == [[2, 3, 4]]
    order = torch.tensor([4, 1, 0, 2, 3])
    assert method.least_redundant(tokens[:, order]).tolist() == [[0, 3, 4]]


@pytest.mark.parametrize(
    ("options", "left"),
    [({}, 10), ({"theta": 0.2}, 13), ({"rounds": 1}, 18), ({"theta": 0.0}, 25)],
)
def test_so_many_patches_stay(options: dict[str, Any], left: int) -> None:
    """25 - 7 = 18, 18 - 5 = 13, 13 - 3 = 10; at 0.2: 25 - 5 - 4 - 3 = 13."""
    kept = built(**options).informative(data().images(slice(4)))
    assert kept.shape == (4, left)
    assert (kept.diff(dim=1) > 0).all()


def test_rounds_drop_as_the_masked_teacher_goes_on_without_the_dropped() -> None:
    method, images = built(), data().images(slice(4))
    teacher: Any = method.masked
    expected = []
    for image in images:
        hidden, place = hiddens(teacher, image[None])[0][0], list(range(25))
        for layer in range(5):
            if layer in (0, 2, 4):
                unit = hidden[1:] / hidden[1:].norm(dim=1, keepdim=True)
                redundancy = (unit @ unit.T).mean(1)
                drop = set(redundancy.argsort(descending=True)[: int(0.3 * len(unit))].tolist())
                stay = [i for i in range(len(unit)) if i not in drop]
                place = [place[i] for i in stay]
                hidden = torch.cat([hidden[:1], hidden[1:][stay]])
            hidden = teacher.layers[layer](hidden[None])[0]
        expected.append(place)
    assert method.informative(images).tolist() == expected


# --- terms ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("theta", [0.0, 0.3])
def test_the_terms_are_the_papers(theta: float) -> None:
    method, images = built(theta=theta, alpha=2.0, beta=3.0), data().images(slice(4))
    teacher: Any = method.masters[0]
    kept = method.informative(images) if theta else torch.arange(25).expand(4, -1)
    rows = [[0, *(k + 1 for k in one)] for one in kept.tolist()]
    terms = method.distil({"x": images})
    told = torch.stack([h[r] for h, r in zip(teacher(images).last_hidden_state, rows, strict=True)])
    told = (told - told.mean(-1, keepdim=True)) / (told.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    gap = method.projector(encode(method.student, images, kept)) - told
    huber = torch.where(gap.abs() < 1, gap.square() / 2, gap.abs() - 0.5).mean()
    torch.testing.assert_close(terms["features"], 2 * huber)
    losses = []
    ours, theirs = hiddens(method.student, images, kept), hiddens(method.masked, images)
    for mine_at, theirs_at in ((2, 4), (3, 5)):
        s = scores(method.student, ours, mine_at, 4)
        t = scores(method.masked, theirs, theirs_at, 4)
        t = torch.stack([one[:, r][:, :, r] for one, r in zip(t, rows, strict=True)])
        losses.append((t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean())
    torch.testing.assert_close(terms["relations"], 3 * torch.stack(losses).mean(), rtol=1e-4, atol=1e-6)


def test_ablations_are_options() -> None:
    batch = {"x": data().images(slice(4))}
    base = built(theta=0.0).distil(batch)
    assert set(built(theta=0.0, beta=0.0).distil(batch)) == {"features"}
    alone = built(theta=0.0, alpha=0.0)
    assert set(alone.distil(batch)) == {"relations"}
    assert alone.turns()[0].trains == ("student",)
    for options in ({"relation": "smooth_l1"}, {"relation_layers": 1}, {"relation_heads": 2}):
        other = built(theta=0.0, **options).distil(batch)
        torch.testing.assert_close(other["features"], base["features"])
        assert not torch.allclose(other["relations"], base["relations"], rtol=1e-3), options
    for options in ({"smooth": 0.1}, {"projector": "mlp"}):
        other = built(theta=0.0, **options).distil(batch)
        assert not torch.allclose(other["features"], base["features"], rtol=1e-3), options


def test_a_target_need_not_be_whitened() -> None:
    method, images = built(theta=0.0, whiten=False), data().images(slice(4))
    with torch.no_grad():
        method.masters[0].layernorm.weight.mul_(3)  # type: ignore[union-attr, operator]
    gap = method.projector(encode(method.student, images)) - method.masters[0](images).last_hidden_state
    huber = torch.where(gap.abs() < 1, gap.square() / 2, gap.abs() - 0.5).mean()
    torch.testing.assert_close(method.distil({"x": images})["features"], huber)


def test_gradients_reach_student_and_projector_alone() -> None:
    method = built()
    sum(method.distil({"x": data().images(slice(4))}).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in method.masters.parameters())
    for role in ("student", "projector"):
        assert all(p.grad is not None for p in method.trained_parameters(role).values()), role
    method = built(alpha=0.0)
    method.distil({"x": data().images(slice(4))})["relations"].backward()
    last: Any = method.student.layers[3]  # type: ignore[index]
    assert last.attention.q_proj.weight.grad is not None
    assert last.attention.v_proj.weight.grad is None
    assert last.mlp.fc1.weight.grad is None


def test_a_student_that_is_its_masked_teacher_has_no_relations_to_learn() -> None:
    _, vit, masked = networks()
    method = HybridDistill(HybridDistill.Options(theta=0.0))
    method.build(masked, [vit, masked])
    method.draw = Draws(torch.Generator().manual_seed(0), slice(0, 4), 4)
    assert float(method.eval().distil({"x": data().images(slice(4))})["relations"].detach()) < 1e-6


def test_what_does_not_fit_is_refused() -> None:
    student, vit, masked = networks()
    cases: dict[str, tuple[dict[str, Any], tuple[nn.Module, ...]]] = {
        "two teachers, not 1": ({}, (student, vit)),
        "second teacher ViTModel cannot leave": ({}, (student, masked, vit)),
        "the student ViTModel cannot leave": ({}, (vit, vit, masked)),
        "cannot be split into 5 heads": ({"relation_heads": 5}, (student, vit, masked)),
        "has 4 layers, not 5": ({"relation_layers": 5}, (student, vit, masked)),
        "nothing to minimise": ({"alpha": 0.0, "beta": 0.0}, (student, vit, masked)),
        "cut images differently": ({}, (student, vit, make_encoder("mae-nano", 1, 16))),
    }
    for message, (options, given) in cases.items():
        with pytest.raises(UserError, match=message):
            HybridDistill(HybridDistill.Options(**options)).build(given[0], given[1:])


# --- diagnostics ------------------------------------------------------------------------------------------------------
def test_heads_that_look_alike_have_collapsed() -> None:
    network: Any = networks()[0].vit.eval()  # type: ignore[operator, union-attr]
    images = data().images(slice(4))
    maps = scores(network, hiddens(network, images), 3, 4).softmax(-1).flatten(2)
    pairs = [torch.cosine_similarity(maps[:, i], maps[:, j], dim=-1) for i in range(4) for j in range(4) if i != j]
    assert attention_collapse(network, images) == pytest.approx(float(torch.stack(pairs).mean().detach()), rel=1e-5)
    attention = network.layers[3].attention
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj):
            part.weight.copy_(part.weight[:12].repeat(4, 1))
            part.bias.copy_(part.bias[:12].repeat(4))
    assert attention_collapse(network, images) == pytest.approx(1.0, abs=1e-5)


def test_a_dense_probe_reads_single_patches() -> None:
    bright = torch.randint(2, (60, 5, 5), generator=torch.Generator().manual_seed(2))
    images = (2.0 * bright - 1).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    belongs = patch_targets(bright.repeat_interleave(4, 1).repeat_interleave(4, 2), 4)
    assert torch.equal(belongs, bright.flatten(1))
    encoder = ImageEncoder(networks()[0])
    assert dense_probe(encoder, images[:40], belongs[:40], images[40:], belongs[40:]) > 0.95
    assert dense_probe(encoder, images[:40], belongs[:40].roll(1, 0), images[40:], belongs[40:]) < 0.65


# --- a run ------------------------------------------------------------------------------------------------------------
def test_a_run_trains_the_student_and_its_projector() -> None:
    method = HybridDistill()
    student, *teachers = networks()
    method.build(student, teachers)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    config = EngineConfig(steps=3, batch=4, log_every=1, check_freezing=True)
    run = Trainer(method, data(), config, None, show=False)
    run.fit()
    moved = {name.split(".")[0] for name, p in run.method.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"student", "projector"}
    assert type(run.export_role()).__name__ == "ViTMAEModel"


def test_the_face_takes_two_teachers(tmp_path: Path) -> None:
    own, *teachers = networks()
    student: Any = sr.distill(
        "hybrid-distill", student=own, teacher=teachers, data=data(), steps=2, run_dir=tmp_path / "run"
    )
    assert student.tokens(data().images()).shape == (12, 25, 48)
    assert (tmp_path / "run" / "samples" / "teacher-2.png").is_file()


def test_places_count_the_class_token() -> None:
    assert with_class(torch.tensor([[0, 3], [1, 2]])).tolist() == [[0, 1, 4], [0, 2, 3]]
