"""DMAE: one mask for both networks, where the gradients go, the two terms against plain arithmetic, and a whole run."""

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
from stillroom.methods.masked.dmae import DMAE
from stillroom.networks.mae import encode, make_encoder, masking, patchify
from stillroom.proofs.base import Arm
from stillroom.proofs.runner import forget
from stillroom.recipe import Recipe
from stillroom.task import sample_rows


def draws(seed: int = 0, size: int = 6) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), slice(0, size), size)


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return make_encoder("mae-nano", 1, 12), make_encoder("mae-mini", 1, 12)


def data(n: int = 24) -> ArrayData:
    return ArrayData(torch.randn(n, 1, 12, 12, generator=torch.Generator().manual_seed(0)))


def built(**options: Any) -> DMAE:
    method = DMAE(DMAE.Options(**{"mask_ratio": 0.5, **options}))
    method.build(*networks())
    method.draw = draws()
    return method.eval()


def by_hand(method: DMAE, images: Tensor, block: int, teacher_block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projected student features, the teacher's, and the reconstruction's error, with the same draw, layer by layer."""
    mask = masking(draws().uniform(6, 9), 0.5)
    found = []
    for network, last in ((method.student, block), (method.teacher, teacher_block)):
        parts: Any = network
        hidden = parts.embeddings.patch_embeddings(images) + parts.embeddings.position_embeddings[:, 1:]
        hidden = hidden.gather(1, mask.ids_keep[..., None].expand(-1, -1, hidden.shape[-1]))
        first = (parts.embeddings.cls_token + parts.embeddings.position_embeddings[:, :1]).expand(6, -1, -1)
        hidden = torch.cat([first, hidden], 1)
        for layer in parts.layers[: last + 1]:
            hidden = layer(hidden)
        found.append(hidden)
    decoder: Any = method.decoder
    pixels = decoder(encode(method.student, images, mask.ids_keep), mask.ids_restore).logits
    errors = (pixels - patchify(images, 4)).square().mean(-1)[mask.mask].mean()
    projector: Any = method.projectors["block"]
    return projector(found[0]), found[1].detach(), errors


# --- one step ---------------------------------------------------------------------------------------------------------
def test_the_terms_are_the_papers() -> None:
    method, batch = built(alpha=3.0), data().batch(0, 0, 6)
    terms = method.pretrain(batch)
    ours, theirs, errors = by_hand(method, batch["x"], 2, 4)  # 3/4 of 4 and (rounded up) of 6 blocks
    unit = [x / x.square().sum(-1, keepdim=True).sqrt() for x in (ours, theirs)]
    torch.testing.assert_close(terms["features"], 3.0 * (unit[0] - unit[1]).abs().mean())
    torch.testing.assert_close(terms["pixels"], errors)
    assert ours.shape == (6, 1 + 4, 64)  # the class token and what is visible of 9 patches


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"normalise": "none"}, lambda s, t: (s - t).abs().mean()),
        ({"normalise": "none", "distance": "mse"}, lambda s, t: (s - t).square().mean()),
        (
            {"normalise": "layer"},
            lambda s, t: (
                (nn.functional.layer_norm(s, (64,), eps=1e-6) - nn.functional.layer_norm(t, (64,), eps=1e-6))
                .abs()
                .mean()
            ),
        ),
    ],
)
def test_distances_and_normalisations_are_options(options: dict[str, Any], expected: Any) -> None:
    method, batch = built(**options), data().batch(0, 0, 6)
    ours, theirs, _ = by_hand(method, batch["x"], 2, 4)
    torch.testing.assert_close(method.pretrain(batch)["features"], expected(ours, theirs))


def test_blocks_may_be_chosen() -> None:
    method, batch = built(student_block=0, teacher_block=1, normalise="none"), data().batch(0, 0, 6)
    ours, theirs, _ = by_hand(method, batch["x"], 0, 1)
    torch.testing.assert_close(method.pretrain(batch)["features"], (ours - theirs).abs().mean())
    with pytest.raises(UserError, match="no block 9"):
        built(student_block=9)


def test_normalised_pixels_and_their_weight_are_options() -> None:
    batch = data().batch(0, 0, 6)
    plain = built().pretrain(batch)["pixels"]
    torch.testing.assert_close(built(pixels=0.5).pretrain(batch)["pixels"], 0.5 * plain)
    assert (built(normalise_pixels=True).pretrain(batch)["pixels"] - plain).abs() > 1e-3


def test_no_gradient_reaches_the_teacher_and_it_stops_early() -> None:
    method, reached = built(), []
    for i, layer in enumerate(method.teacher.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: reached.append(i))
    sum(method.pretrain(data().batch(0, 0, 6)).values()).backward()  # type: ignore[union-attr]
    assert reached == [0, 1, 2, 3, 4]
    assert all(p.grad is None for p in method.teacher.parameters())
    for role in ("student", "decoder", "projectors"):
        assert all(p.grad is not None for p in method.trained_parameters(role).values()), role


def test_the_features_term_leaves_later_blocks_alone_and_needs_no_decoder() -> None:
    method = built(pixels=0.0)
    assert method.turns()[0].trains == ("student", "projectors")
    terms = method.pretrain(data().batch(0, 0, 6))
    assert set(terms) == {"features"}
    terms["features"].backward()
    layers: Any = method.student.layers
    assert all(p.grad is None for p in layers[3].parameters())
    assert all(p.grad is not None for p in layers[2].parameters())
    assert method.decoder is None


def test_without_alpha_it_is_a_plain_masked_autoencoder() -> None:
    method = DMAE(DMAE.Options(alpha=0.0, mask_ratio=0.5))
    student, _ = networks()
    method.build(student)
    method.draw = draws()
    batch = data().batch(0, 0, 6)
    terms = method.eval().pretrain(batch)
    student.config.mask_ratio = 0.5
    torch.testing.assert_close(terms["pixels"], student.eval()(batch["x"], noise=draws().uniform(6, 9)).loss)
    assert set(terms) == {"pixels"}
    assert method.turns()[0].trains == ("student", "decoder")


@pytest.mark.parametrize(("ratio", "visible"), [(0.0, 9), (0.78, 1)])
def test_the_mask_ratio_decides_what_is_seen(ratio: float, visible: int) -> None:
    method, seen = built(mask_ratio=ratio), []
    for network in (method.student, method.teacher):
        network.layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    method.pretrain(data().batch(0, 0, 6))
    assert seen == [1 + visible] * 2


# --- what is refused --------------------------------------------------------------------------------------------------
def test_networks_that_do_not_fit_are_refused() -> None:
    student, teacher = networks()
    cases: dict[str, tuple[dict[str, Any], tuple[nn.Module, ...]]] = {
        "dmae has no teacher": ({}, (student,)),
        "cut images differently": ({}, (student, make_encoder("mae-nano", 1, 16))),
        "has no decoder": ({}, (student.vit, teacher)),  # type: ignore[union-attr]
        "nothing to minimise": ({"alpha": 0.0, "pixels": 0.0}, (student, teacher)),
        "leaves 0 of 9": ({"mask_ratio": 0.95}, (student, teacher)),
    }
    for message, (options, given) in cases.items():
        with pytest.raises(UserError, match=message):
            DMAE(DMAE.Options(**options)).build(*given)
    with pytest.raises(UserError, match=r"options\.normalise"):
        Recipe.load("dmae", ["options.normalise=l3"])


# --- runs -------------------------------------------------------------------------------------------------------------
def trained(folder: Path | None = None, resume: bool = False, **given: Any) -> Trainer:
    method = DMAE(DMAE.Options(mask_ratio=0.5))
    torch.manual_seed(5)
    method.build(*networks())
    config = EngineConfig(steps=6, batch=6, checkpoint_every=2, log_every=1, check_freezing=True, schedule="cosine")
    return Trainer(method, data(), config, folder, resume, show=False, **given)


def test_a_run_trains_what_it_should_and_resumes(tmp_path: Path) -> None:
    run = trained(tmp_path / "straight")
    before = {name: p.detach().clone() for name, p in run.method.named_parameters()}
    run.fit()
    moved = {name for name, p in run.method.named_parameters() if not torch.equal(p, before[name])}
    roots = {name.split(".")[0] for name in moved}
    assert roots == {"student", "decoder", "projectors"}
    assert not any(name.endswith(("position_embeddings", "decoder_pos_embed")) for name in moved)

    class Stop(Exception):
        pass

    def stop(_: Trainer, done: int) -> None:
        if done == 4:
            raise Stop

    with pytest.raises(Stop):
        trained(tmp_path / "run", callbacks=[stop]).fit()
    resumed = trained(tmp_path / "run", resume=True)
    resumed.fit()
    assert all(torch.equal(a, b) for a, b in zip(run.method.parameters(), resumed.method.parameters(), strict=True))
    assert type(run.export_role()).__name__ == "ViTMAEModel"


def test_the_face_makes_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import ViTMAEModel

    pictures = ArrayData(torch.randint(256, (20, 1, 12, 12), dtype=torch.uint8))
    own, teacher = networks()
    run_dir = tmp_path / "run"
    student = sr.distill("dmae", student=own, teacher=teacher, data=pictures, steps=3, run_dir=run_dir)
    assert student.features(pictures.images()).shape == (20, 48)  # type: ignore[union-attr]
    again = sr.load(tmp_path / "run")
    torch.testing.assert_close(again.features(pictures.images()), student.features(pictures.images()))  # type: ignore[union-attr]
    assert ViTMAEModel.from_pretrained(tmp_path / "run" / "student").config.hidden_size == 48
    card = (tmp_path / "run" / "student" / "README.md").read_text()
    assert "student.features(images)" in card
    assert "image-feature-extraction" in card
    with pytest.raises(UserError, match="describes images"):
        sample_rows(student, [], [], 1, 0)


def test_an_untrained_teacher_is_another_one_of_the_same_shape() -> None:
    method = built()
    kept = {name: p.clone() for name, p in method.teacher.state_dict().items()}
    forget(method, 3)
    now = method.teacher.state_dict()
    assert torch.equal(now["embeddings.position_embeddings"], kept["embeddings.position_embeddings"])
    assert not torch.equal(now["layers.1.mlp.fc1.weight"], kept["layers.1.mlp.fc1.weight"])
    assert Arm("a", teacher="untrained").key("canvas", 0) != Arm("a").key("canvas", 0)
