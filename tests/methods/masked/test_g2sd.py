"""G2SD: both stages' losses against plain arithmetic, who is trained, what is carried over, and the layer-wise rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stillroom as sr
from stillroom.augment.images import mix_images
from stillroom.bench.encoders import EncoderBench
from stillroom.data.source import ArrayData
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.losses.soft_labels import decoupled_loss
from stillroom.method import Stage
from stillroom.methods.masked.g2sd import G2SD
from stillroom.networks.mae import encode, make_encoder, masking
from stillroom.networks.vit import PooledClassifier, carry_encoder, make_vit_classifier


def draws(seed: int = 0, size: int = 6) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), slice(0, size), size)


def networks() -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(1)
    student, teacher = make_encoder("mae-nano", 1, 12), make_encoder("mae-micro", 1, 12)
    tutor = PooledClassifier(make_encoder("mae-nano", 1, 12).vit, 3)
    nn.init.normal_(tutor.head.weight)
    return student, teacher, tutor


def data(n: int = 24) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 12, 12, generator=generator)
    return ArrayData(images, {"label": torch.arange(n) % 3}, ["a", "b", "c"])


def built(stage: str = "generic", **options: Any) -> G2SD:
    method = G2SD(G2SD.Options(**{"mask_ratio": 0.5, "mixup": 0.0, "cutmix": 0.0, **options}))
    student, *teachers = networks()
    method.build(student, teachers)
    method.prepare(data())
    method.draw, method.stage = draws(), Stage(stage)
    return method.eval()


def decoded(network: Any, head: Any, latent: Tensor, restore: Tensor, blocks: int) -> Tensor:
    """A decoder's hidden state after some blocks, layer by layer, from the tokens of the visible patches."""
    decoder = network
    hidden = decoder.decoder_embed(latent)
    missing = decoder.mask_token.expand(len(latent), restore.shape[1] + 1 - hidden.shape[1], -1)
    patches = torch.cat([hidden[:, 1:], missing], 1)
    patches = patches.gather(1, restore[..., None].expand(-1, -1, patches.shape[-1]))
    hidden = torch.cat([hidden[:, :1], patches], 1) + decoder.decoder_pos_embed
    for layer in decoder.decoder_layers[:blocks]:
        hidden = layer(hidden)
    return head(hidden) if head is not None else hidden


def both_sides(method: G2SD, images: Tensor) -> tuple[Tensor, Tensor, Any]:
    mask = masking(draws().uniform(6, 9), 0.5)
    teacher: Any = method.teacher
    ours = decoded(method.decoder, method.head, encode(method.encoder, images, mask.ids_keep), mask.ids_restore, 2)
    theirs = decoded(teacher.decoder, None, encode(teacher.vit, images, mask.ids_keep), mask.ids_restore, 2)
    return ours, theirs.detach(), mask


def smooth(gap: Tensor, beta: float) -> Tensor:
    size = gap.abs()
    return torch.where(size < beta, size.square() / (2 * beta), size - beta / 2)


# --- generic ----------------------------------------------------------------------------------------------------------
def test_the_decoder_half_way_is_the_target_for_all_tokens() -> None:
    method, batch = built(), data().batch(0, 0, 6)
    ours, theirs, _ = both_sides(method, batch["x"])
    target = (theirs - theirs.mean(-1, keepdim=True)) / (theirs.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    assert ours.shape == (6, 10, 64)  # class token and all 9 patches
    torch.testing.assert_close(method.generic(batch)["features"], smooth(ours - target, 2.0).mean())
    raw = built(whiten=False, beta=0.5)
    torch.testing.assert_close(raw.generic(batch)["features"], smooth(ours - theirs, 0.5).mean())


def test_removed_patches_alone_leave_the_class_token_out() -> None:
    method, batch = built(supervise="masked", whiten=False), data().batch(0, 0, 6)
    ours, theirs, mask = both_sides(method, batch["x"])
    per_token = smooth(ours - theirs, 2.0).mean(-1)[:, 1:]
    torch.testing.assert_close(method.generic(batch)["features"], per_token[mask.mask].mean())


def test_encoder_features_are_an_option() -> None:
    batch = data().batch(0, 0, 6)
    plain, more = built(), built(encoder_weight=0.5)
    assert set(plain.generic(batch)) == {"features"}
    assert "encoder_head" in more.turns()[0].trains
    mask = masking(draws().uniform(6, 9), 0.5)
    latent = encode(more.teacher.vit, batch["x"], mask.ids_keep)  # type: ignore[arg-type]
    told = more.encoder_head(encode(more.encoder, batch["x"], mask.ids_keep))
    expected = 0.5 * smooth(told - F.layer_norm(latent, (96,), eps=1e-6), 2.0).mean()
    torch.testing.assert_close(more.generic(batch)["encoder"], expected)


def test_gradients_of_the_generic_stage_stop_at_the_teacher() -> None:
    method, reached = built(), []
    teacher: Any = method.teacher
    for i, layer in enumerate(teacher.decoder.decoder_layers):
        layer.register_forward_pre_hook(lambda *_, i=i: reached.append(i))
    method.generic(data().batch(0, 0, 6))["features"].backward()
    assert reached == [0, 1]  # of four blocks
    assert all(p.grad is None for p in (*method.teacher.parameters(), *method.tutor.parameters()))
    assert all(p.grad is None for p in method.student.parameters())
    missing = {n for n, p in method.trained_parameters("encoder").items() if p.grad is None}
    assert missing == set()
    idle = {n for n, p in method.trained_parameters("decoder").items() if p.grad is None}
    assert idle == {f"decoder_{part}.{what}" for part in ("norm", "pred") for what in ("weight", "bias")}


def test_pixels_are_the_plain_masked_autoencoder() -> None:
    method, batch = built(target="pixels"), data().batch(0, 0, 6)
    student: Any = networks()[0].eval()
    student.config.mask_ratio = 0.5
    expected = student(batch["x"], noise=draws().uniform(6, 9)).loss
    torch.testing.assert_close(method.generic(batch)["pixels"], expected)
    assert not hasattr(method, "teacher")


# --- specific ---------------------------------------------------------------------------------------------------------
def test_half_labels_half_decisions() -> None:
    method, batch = built("specific"), data().batch(0, 0, 6)
    for head in ("cls_classifier", "distillation_classifier"):
        nn.init.normal_(getattr(method.student, head).weight)
    terms = method.specific(batch)
    output: Any = method.student(batch["x"])
    label, told = batch["cond"]["label"], method.tutor(batch["x"]).argmax(-1)
    log_s, log_d = output.cls_logits.log_softmax(-1), output.distillation_logits.log_softmax(-1)
    rows = torch.arange(6)
    torch.testing.assert_close(terms["label"], -0.5 * (0.9 * log_s[rows, label] + 0.1 * log_s.mean(-1)).mean())
    torch.testing.assert_close(terms["teacher"], -0.5 * log_d[rows, told].mean())
    assert (told != label).any()
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in (*method.tutor.parameters(), *method.encoder.parameters()))
    assert all(p.grad is not None for p in method.student.parameters())
    lean = built("specific", hard_weight=0.25, smoothing=0.0).specific(batch)["label"]  # its heads say nothing yet
    torch.testing.assert_close(lean, 0.75 * torch.tensor(3.0).log(), rtol=1e-3, atol=0)


def test_labels_alone_and_soft_labels_are_options() -> None:
    batch = data().batch(0, 0, 6)
    plain, nkd = built("specific", specific="labels", smoothing=0.0), built("specific", specific="nkd")
    for method in (plain, nkd):
        assert type(method.student).__name__ == "DeiTForImageClassification"
        nn.init.normal_(method.student.classifier.weight)
    logits: Any = plain.student(batch["x"]).logits  # type: ignore[operator]
    torch.testing.assert_close(plain.specific(batch)["label"], F.cross_entropy(logits, batch["cond"]["label"]))
    logits = nkd.student(batch["x"]).logits  # type: ignore[operator]
    expected = decoupled_loss(logits, nkd.tutor(batch["x"]), batch["cond"]["label"])
    torch.testing.assert_close(nkd.specific(batch)["nkd"], expected)
    assert not hasattr(plain, "tutor")


@pytest.mark.parametrize("which", ["mixup", "cutmix", "both"])
def test_labels_are_mixed_as_the_pixels_are(which: str) -> None:
    images = torch.arange(8.0)[:, None, None, None].expand(8, 1, 10, 10)
    targets = torch.eye(8)
    shares = []
    for seed in range(40):
        mixed, soft = mix_images(images, targets, draws(seed, 8), 0.8 * (which != "cutmix"), 1.0 * (which != "mixup"))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), soft @ torch.arange(8.0))
        torch.testing.assert_close(soft.sum(1), torch.ones(8))
        flat = bool((mixed[1] == mixed[1, 0, 0, 0]).all())
        shares.append((float(soft[0, 0]), flat))
    assert min(s for s, _ in shares) < 0.3
    assert max(s for s, _ in shares) > 0.7
    if which == "mixup":
        assert all(flat for _, flat in shares)
    if which == "both":
        assert 5 < sum(flat for _, flat in shares) < 35
    assert mix_images(images, targets, draws(), 0.0, 0.0)[0] is images


def test_the_classifier_carries_the_encoder() -> None:
    """Without its distillation token, the classifier computes what the encoder does."""
    encoder: Any = networks()[0].vit.eval()  # type: ignore[operator, union-attr]
    classifier: Any = make_vit_classifier(encoder, 3, "DeiTForImageClassificationWithTeacher").eval()
    images = data().images(slice(4))
    expected = encode(encoder, images)
    hidden = classifier.deit.embeddings(images)
    kept = torch.cat([hidden[:, :1], hidden[:, 2:]], 1)
    for layer in classifier.deit.layers:
        kept = layer(kept)
    torch.testing.assert_close(classifier.deit.layernorm(kept), expected)
    other: Any = make_encoder("mae-nano", 1, 12)
    other.vit.layers = other.vit.layers[:3]
    with pytest.raises(UserError, match="no place for 'layers"):
        carry_encoder(other.vit, classifier)


def test_rates_fall_towards_the_first_block() -> None:
    method = built(layer_decay=0.5)
    _, specific = method.turns()
    rates = {n: method.rate(specific, n) for n, _ in method.named_parameters() if n.startswith("student.")}
    assert {r for n, r in rates.items() if "classifier" in n or n.startswith("student.deit.layernorm")} == {1.0}
    for i in range(4):
        assert {r for n, r in rates.items() if f".layers.{i}." in n} == {0.5 ** (4 - i)}
    assert {r for n, r in rates.items() if ".embeddings." in n} == {0.5**5}
    assert method.rate(method.turns()[0], "encoder.layers.0.mlp.fc1.weight") == 1.0


# --- runs -------------------------------------------------------------------------------------------------------------
def trained(folder: Path | None = None, resume: bool = False, callbacks: Any = (), **options: Any) -> Trainer:
    settings = {"mask_ratio": 0.5, "generic_share": 3, "specific_share": 3, "labels": 4, "layer_decay": 0.5, **options}
    method = G2SD(G2SD.Options(**settings))
    torch.manual_seed(5)
    student, *teachers = networks()
    method.build(student, teachers)
    config = EngineConfig(steps=6, batch=6, checkpoint_every=1, log_every=1, check_freezing=True)
    return Trainer(method, data(), config, folder, resume, show=False, callbacks=callbacks)


def test_each_stage_trains_its_own_and_the_student_starts_from_the_encoder(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    seen: list[tuple[str, set[str]]] = []
    last: dict[str, Tensor] = {}

    def watch(run: Trainer, done: int) -> None:
        now = {n: p.detach().clone() for n, p in run.method.named_parameters()}
        moved = {n for n in now if not torch.equal(now[n], last[n])}
        seen.append((run.method.stage.name, {n.split(".")[0] for n in moved}))
        last.update(now)
        if done == 4:  # Adam's first step moves every weight by its rate
            student, encoder = (dict(run.method.role(r).named_parameters()) for r in ("student", "encoder"))
            for i in range(4):
                gap = student[f"deit.layers.{i}.mlp.fc1.bias"] - encoder[f"layers.{i}.mlp.fc1.bias"]
                assert float(gap.detach().abs().max()) == pytest.approx(1e-3 * 0.5 ** (4 - i), rel=0.05)

    run = trained(tmp_path / "straight", callbacks=[watch])
    last = {n: p.detach().clone() for n, p in run.method.named_parameters()}
    run.fit()
    assert seen == [("generic", {"encoder", "decoder", "head"})] * 3 + [("specific", {"student"})] * 3
    assert data().n == 24
    assert run.data.parts["labelled"].labels.bincount().tolist() == [4, 4, 4]  # type: ignore[attr-defined]

    def stop(_: Trainer, done: int) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        trained(tmp_path / "run", callbacks=[stop]).fit()
    again = trained(tmp_path / "run", resume=True)
    again.fit()
    assert all(torch.equal(a, b) for a, b in zip(run.method.parameters(), again.method.parameters(), strict=True))


def test_without_a_specific_stage_the_student_stays_an_encoder() -> None:
    run = trained(specific_share=0.0)
    run.fit()
    assert type(run.export_role()).__name__ == "ViTMAEModel"
    assert [t.trains for t in run.method.turns()] == [("encoder", "decoder", "head")]


def test_the_face_makes_a_classifier_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import DeiTForImageClassificationWithTeacher

    own, *teachers = networks()
    student: Any = sr.distill(
        "g2sd", student=own, teacher=teachers, data=data(), steps=4, run_dir=tmp_path / "run", labels=4, mixup=0.0
    )
    images = data().images()
    loaded = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "run" / "student").eval()
    p = student.probabilities(images)
    torch.testing.assert_close(loaded(images).logits.softmax(-1).detach(), p)
    torch.testing.assert_close(sr.load(tmp_path / "run").probabilities(images), p)  # type: ignore[union-attr]


def test_misled_teachers_see_other_images() -> None:
    method, batch = built(), data().batch(0, 0, 6)
    told = method.told(batch["x"])
    mask = masking(draws().uniform(6, 9), 0.5)
    hidden = method.target(batch["x"], mask)[0]
    EncoderBench().mislead(method, data())
    torch.testing.assert_close(method.told(batch["x"]), told.roll(1, 0))
    assert not torch.allclose(method.target(batch["x"], mask)[0], hidden)


def test_missing_teachers_are_named() -> None:
    student, teacher, _ = networks()
    cases: dict[str, tuple[dict[str, Any], tuple[nn.Module, ...]]] = {
        "no teacher": ({}, (student,)),
        "no fine-tuned teacher": ({}, (student, teacher)),
        "has no decoder": ({}, (student, teacher.vit)),  # type: ignore[union-attr]
        "share 0": ({"generic_share": 0.0, "specific_share": 0.0}, (student, teacher)),
    }
    for message, (options, given) in cases.items():
        with pytest.raises(UserError, match=message):
            G2SD(G2SD.Options(**options)).build(given[0], given[1:])
