"""DHO: two heads and their mixture, where the gradients go, the text-image teacher, and whole runs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stillroom as sr
from stillroom.augment.images import VIEW, Augmentation, cropped
from stillroom.bench import get_bench
from stillroom.bench.digits.bench import SemiDigitsBench
from stillroom.bench.digits.teachers import tiny_clip, train_clip
from stillroom.data.source import ArrayData
from stillroom.diffusion.sampling import sampler_from_dict
from stillroom.draws import Draws
from stillroom.engine.config import EngineConfig
from stillroom.engine.trainer import Trainer
from stillroom.errors import UserError
from stillroom.folders.image_networks import make_classifier
from stillroom.losses.conflict import gradient_cosine
from stillroom.losses.soft_labels import mix_heads
from stillroom.methods.classifier.dho import DHO
from stillroom.networks.dual_head import ALPHAS, TEMPERATURES, TwoHeads, best_mixture, exchange, last_layer, two_heads
from stillroom.networks.prompt_classifier import FewShotCache, PromptClassifier
from stillroom.networks.recognition import ForwardPass, TwoHeadPass
from stillroom.proofs.base import Arm, Claim
from stillroom.proofs.runner import run_arm, score, train_arm
from stillroom.recipe import Recipe
from stillroom.run import run
from stillroom.tasks.classify.model import ImageClassifier
from tiny import CLASSES, make_data
from workers.toy import fitted

C, N = 3, 30


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, C))


def data(n: int = N) -> ArrayData:
    generator = torch.Generator().manual_seed(0)
    images, label = torch.randn(n, 1, 4, 4, generator=generator), torch.arange(n) % C
    whole = ArrayData(images, {"label": label}, CLASSES)
    whole.parts["heldout"] = ArrayData(images[:12].clone() + 0.1, {"label": label[:12]}, CLASSES)
    return whole


def draws(seed: int = 0, size: int = 6) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), slice(0, size), size)


def built(**options: Any) -> tuple[DHO, ArrayData]:
    method, read = DHO(DHO.Options(**options)), data()
    torch.manual_seed(3)
    method.build(network(), network(1))
    method.draw = draws()
    method.prepare(read)
    return method.eval(), read


def stream(read: ArrayData, step: int = 0, rows: slice | None = None) -> dict[str, Any]:
    """A batch of the stage ``distil``, as the engine reads it."""
    return {name: read.parts[name].batch(0, step, 6, rows) for name in ("unlabelled", "few")}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- heads ------------------------------------------------------------------------------------------------------------
def test_the_ends_of_the_mixture_are_the_heads() -> None:
    a, b = randn(5, C), randn(5, C, seed=1)
    torch.testing.assert_close(mix_heads(a, b, 1.0, 0.5), a.softmax(-1))
    torch.testing.assert_close(mix_heads(a, b, 0.0, 1.0), b.softmax(-1))
    net = nn.Identity()
    both = torch.cat([a, b], -1)
    p = TwoHeadPass(0.3, 2.0).sample(net, both).softmax(-1)
    torch.testing.assert_close(p, 0.3 * a.softmax(-1) + 0.7 * (b / 2).softmax(-1))
    wide = torch.tensor([[300.0, 0.0, 0.0, 300.0, 0.0, 0.0]])
    assert torch.isfinite(TwoHeadPass(0.5, 0.5).sample(net, wide)).all()


def test_free_heads_reproduce_what_a_single_head_would_learn() -> None:
    """With lambda for alpha and beta 1: the minimiser lambda y + (1 - lambda) p of both losses on one head."""
    weight, y, p = 0.3, torch.arange(4) % C, randn(4, C).softmax(-1)
    single = torch.zeros(4, C, requires_grad=True)
    label, taught = torch.zeros(4, C, requires_grad=True), torch.zeros(4, C, requires_grad=True)
    optimizer = torch.optim.LBFGS([single, label, taught], lr=1.0, max_iter=400, tolerance_grad=1e-9)

    def loss() -> Tensor:
        optimizer.zero_grad()
        one = -(weight * F.one_hot(y, C) + (1 - weight) * p) * single.log_softmax(-1)
        two = F.cross_entropy(label, y, reduction="sum") + F.kl_div(taught.log_softmax(-1), p, reduction="sum")
        total = one.sum() + two
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        label *= 100  # a table has no finite optimum for a one-hot target
        mixed = mix_heads(label, taught, weight, 1.0)
    torch.testing.assert_close(mixed, single.detach().softmax(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed, weight * F.one_hot(y, C) + (1 - weight) * p, atol=1e-4, rtol=0)


@pytest.mark.parametrize("term", ["label", "teacher"])
def test_each_loss_reaches_its_own_head_and_the_backbone(term: str) -> None:
    method, read = built(labelled=2)
    method.distil(stream(read))[term].backward()
    heads = two_heads(method.student)
    assert heads is not None
    own, other = (slice(C), slice(C, None)) if term == "label" else (slice(C, None), slice(C))
    for gradient in (heads.weight.grad, heads.bias.grad):
        assert gradient is not None
        assert gradient[own].abs().max() > 0
        assert torch.equal(gradient[other], torch.zeros_like(gradient[other]))
    backbone: Any = method.student[1]
    assert backbone.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_terms_are_the_papers() -> None:
    method, read = built(labelled=2, gt_weight=0.3, temperature=3.0)
    batch = stream(read)
    terms = method.distil(batch)
    few = batch["few"]
    images = torch.cat([few["x"], batch["unlabelled"]["x"]])
    output, p = method.student(images), (method.teacher(images) / 3).softmax(-1)
    q = (output[:, C:] / 3).log_softmax(-1)
    kl = (p * (p.log() - q)).sum(-1)
    torch.testing.assert_close(terms["teacher"], 0.7 * 9 * (kl[:6].mean() + kl[6:].mean()))
    torch.testing.assert_close(terms["label"], 0.3 * F.cross_entropy(output[:6, :C], few["cond"]["label"]))


def test_one_head_takes_both_losses() -> None:
    method, read = built(labelled=2, heads="one")
    assert two_heads(method.student) is None
    terms = method.distil(stream(read))
    last: Any = method.student[-1]
    for name in ("label", "teacher"):
        last.zero_grad()
        terms[name].backward(retain_graph=True)
        assert last.weight.grad.abs().max() > 0
    assert method.sampler() == ForwardPass()


def test_heads_may_be_aligned_with_text_features() -> None:
    z = randn(4, 5)
    for align in ("paper", "code"):
        heads = TwoHeads(5, C, align, zeta=0.1)  # type: ignore[arg-type]
        output = heads(z)
        w, b, unit = heads.weight[C:], heads.bias[C:], z / z.norm(dim=1, keepdim=True)
        torch.testing.assert_close(output[:, :C], z @ heads.weight[:C].T + heads.bias[:C])
        cosine = unit @ (w / w.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(output[:, C:], cosine / 0.1 if align == "paper" else (unit @ w.T + b) / 0.1)
    heads = TwoHeads(5, C)
    directions = randn(C, 5, seed=4)
    before = heads.weight[C:].detach().clone()
    heads.start(directions, both=False)
    assert torch.equal(heads.weight[:C], directions)
    assert torch.equal(heads.weight[C:], before)
    heads.start(directions, both=True)
    assert torch.equal(heads.weight[C:], directions)
    assert not heads.bias.any()
    with pytest.raises(UserError, match=r"options\.init to none"):
        heads.start(randn(C, 4), both=True)


def test_heads_take_the_last_layers_place() -> None:
    student: Any = make_classifier("resnet-small", 1, C)
    heads = exchange(student, "none", 0.01)
    assert student(torch.zeros(2, 1, 8, 8)).logits.shape == (2, 2 * C)
    assert two_heads(student) is heads
    assert student.config.num_labels == 2 * C
    with pytest.raises(UserError, match="does not end in a linear layer"):
        last_layer(nn.Conv2d(1, 1, 1))


# --- the mixture ------------------------------------------------------------------------------------------------------
def test_the_best_mixture_is_that_of_the_grid() -> None:
    label, taught, y = randn(60, C), 3 * randn(60, C, seed=1), torch.arange(60) % C
    label, taught = label + F.one_hot(y, C), taught + 2 * F.one_hot(y, C)
    alpha, temperature = best_mixture(label, taught, y)

    def right(a: float, t: float) -> int:
        mixed = a * label.softmax(-1) + (1 - a) * (taught / t).softmax(-1)
        return int((mixed.argmax(-1) == y).sum())

    assert right(alpha, temperature) == max(right(a, t) for a in ALPHAS for t in TEMPERATURES)
    sure = 9 * F.one_hot(y, C).float()
    assert best_mixture(sure, randn(60, C), y)[0] > 0.5
    assert best_mixture(randn(60, C), sure, y)[0] < 0.5
    assert (len(ALPHAS), TEMPERATURES) == (21, (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0))


def test_the_mixture_is_tuned_on_held_out_images_or_fixed() -> None:
    method, _ = built(labelled=2)
    assert method.sampler() == TwoHeadPass(0.5, 0.5)
    method.finish(method.student)
    logits = method.student(method.heldout.images()).detach()
    assert method.sampler() == TwoHeadPass(*best_mixture(*logits.chunk(2, -1), method.heldout.labels))
    fixed, _ = built(labelled=2, mixture="fixed", alpha=0.4, beta=0.75)
    fixed.finish(fixed.student)
    assert fixed.sampler() == TwoHeadPass(0.4, 0.75)
    assert sampler_from_dict(fixed.sampler().to_dict()) == fixed.sampler()


# --- conflict ---------------------------------------------------------------------------------------------------------
def test_the_cosine_of_two_gradients() -> None:
    w, v = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    first, second = w @ torch.tensor([1.0, 2.0]) + 2 * v.sum(), w @ torch.tensor([2.0, -1.0]) + v.sum()
    assert float(gradient_cosine(first, second, [w, v])) == pytest.approx(2 / (3 * math.sqrt(6)))
    assert float(gradient_cosine(first, -first, [w, v])) == pytest.approx(-1)
    assert float(gradient_cosine(w.sum(), v.sum(), [w, v])) == 0.0  # neither graph reaches the other's weights
    assert w.grad is None


def test_the_conflict_is_of_the_backbone_and_measured_when_due() -> None:
    method, read = built(labelled=2, conflict_every=3)
    batch = stream(read)
    for step in range(3):
        method.step, method.notes = step, {}
        method.distil(batch)
        assert ("gradient_cosine" in method.notes) == (step == 2)
    body: Any = method.student[:-1]
    terms = method.distil(batch)  # of the same step and data
    found = [torch.autograd.grad(t, list(body.parameters()), retain_graph=True) for t in terms.values()]
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in found)
    torch.testing.assert_close(method.notes["gradient_cosine"], a @ b / a.norm() / b.norm())
    never, _ = built(labelled=2, conflict_every=0)
    never.distil(batch)
    assert "gradient_cosine" not in never.notes


# --- data -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("labelled", "each"), [(2, 2), (0.3, 3), (0.01, 1)])
def test_few_images_of_each_class_keep_their_labels(labelled: float, each: int) -> None:
    _, read = built(labelled=labelled)
    few, rest = read.parts["labelled"], read.parts["unlabelled"]
    assert torch.bincount(few.labels).tolist() == [each] * C
    assert sorted([*few.ids.tolist(), *rest.ids.tolist()]) == list(range(N))
    assert torch.equal(read.array[few.ids], few.array)
    assert "label" not in rest.cond


def test_labelled_images_are_cycled_and_spread_over_processes() -> None:
    method, read = built(labelled=2)
    seen = []
    for step in range(3):
        method.step = step
        _, ids, _, label = method.streams(stream(read, step))
        assert torch.equal(label, ids[:6] % C)
        seen += ids[:6].tolist()
    assert sorted(seen) == sorted(3 * read.parts["labelled"].ids.tolist())
    whole = seen[-6:]
    for part in (slice(0, 3), slice(3, 6)):
        for rows, total in ((part, 6), (slice(0, 3), 3)):  # draws for the global batch, or for each process
            method.draw = Draws(torch.Generator(), rows, total)
            _, ids, *_ = method.streams(stream(read, 2, part))
            assert ids[:3].tolist() == whole[part]


def test_student_and_teacher_see_the_same_view() -> None:
    method, read = built(labelled=2, shift=1, flip=0.5, crop=0.6)
    seen: list[Tensor] = []
    for role in (method.student, method.teacher):
        role.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    batch = stream(read)
    method.distil(batch)
    assert torch.equal(seen[0], seen[1])
    assert len(seen[0]) == 12
    assert not torch.equal(seen[0][6:], batch["unlabelled"]["x"])


def test_crops_keep_their_share_of_the_image() -> None:
    ramp = torch.linspace(-1, 1, 16).expand(2000, 1, 16, 16).contiguous()
    u = torch.rand(2000, VIEW, generator=torch.Generator().manual_seed(0))
    views = cropped(ramp, u[:, :3], 0.25)
    extent = (views[:, 0, 8, 12] - views[:, 0, 8, 3]) / (ramp[0, 0, 8, 12] - ramp[0, 0, 8, 3])
    torch.testing.assert_close(extent**2, 0.25 + 0.75 * u[:, 0], atol=0.02, rtol=0.0)
    middle = views.mean((1, 2, 3))  # its ends are where the crop touches the edge
    assert float(middle.abs().max()) < 0.55
    torch.testing.assert_close(cropped(ramp, u[:, :3], 1.0), ramp)
    assert Augmentation()(ramp, u) is ramp


def test_data_with_a_labelled_part_bring_their_own() -> None:
    read = data()
    few = read.take(torch.arange(6))
    read.parts |= {"labelled": few, "unlabelled": read}
    method = DHO(DHO.Options())
    method.build(network(), network(1))
    method.draw = draws()
    method.prepare(read)
    assert method.labelled is few


def test_what_does_not_fit_is_refused() -> None:
    method = DHO(DHO.Options())
    with pytest.raises(UserError, match="dho has no teacher"):
        method.build_from({"student": network(), "teachers": []})
    with pytest.raises(UserError, match="one teacher, 2 were given"):
        method.build_from({"student": network(), "teachers": [network(), network()]})
    with pytest.raises(UserError, match="needs a text-image teacher"):
        DHO(DHO.Options(init="both")).build(network(), network(1))
    with pytest.raises(UserError, match="are for two heads"):
        DHO(DHO.Options(heads="one", align="paper")).build(network(), network(1))
    with pytest.raises(UserError, match="leaves no unlabelled image"):
        built(labelled=10)
    method.build(network(), network(1))
    method.draw, bare = draws(), data()
    bare.parts.clear()
    with pytest.raises(UserError, match="needs held-out data"):
        method.prepare(bare)


def trainer(folder: Path | None = None, resume: bool = False, callbacks: Any = (), **options: Any) -> Trainer:
    method = DHO(DHO.Options(**{"labelled": 2, "shift": 1, "conflict_every": 2, **options}))
    torch.manual_seed(5)
    method.build(network(), network(1))
    config = EngineConfig(steps=8, batch=6, checkpoint_every=1, log_every=1, check_freezing=True)
    return Trainer(method, data(), config, folder, resume, callbacks=callbacks, show=False)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(_: Trainer, done: int) -> None:
        if done == 5:
            raise Stop

    straight = trainer()
    straight.fit()
    with pytest.raises(Stop):
        trainer(tmp_path / "run", callbacks=[stop]).fit()
    resumed = trainer(tmp_path / "run", resume=True)
    resumed.fit()
    ours, theirs = resumed.export_role().state_dict(), straight.export_role().state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert "health/gradient_cosine" in resumed.history[-1]


# --- text-image teachers ----------------------------------------------------------------------------------------------
WORDS = ("bar", "cross", "dot")
SAID = ("a {}.", "the picture of a {}")


@pytest.fixture(scope="module")
def clip() -> PromptClassifier:
    torch.manual_seed(0)
    return PromptClassifier(*tiny_clip(WORDS, SAID, 8, 4, width=16), WORDS).eval()


def test_a_prompt_classifier_is_a_scaled_cosine(clip: PromptClassifier) -> None:
    from transformers import CLIPModel

    images, model = randn(4, 1, 8, 8).clamp(-1, 1), clip.clip
    assert isinstance(model, CLIPModel)
    clip.ask(SAID, zeta=0.05)
    with torch.no_grad():
        seen = model.get_image_features(pixel_values=images).pooler_output
        found = clip(images)
        for name in range(C):
            tokens = clip.tokenizer([p.format(WORDS[name]) for p in SAID], padding=True, return_tensors="pt")
            said = model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
            mean = (said / said.norm(dim=1, keepdim=True)).mean(0)
            torch.testing.assert_close(found[:, name], F.cosine_similarity(seen, mean[None]) / 0.05)
            clip.ask(SAID, 0.05, "plain")
            torch.testing.assert_close(clip.text[name], F.normalize(said.mean(0), dim=0))
            clip.ask(SAID, 0.05)
    with pytest.raises(UserError, match="a place for the class"):
        clip.ask(("a digit",))
    with pytest.raises(UserError, match="above 0"):
        clip.ask(SAID, 0.0)


def test_any_clip_folder_is_a_teacher(tmp_path: Path) -> None:
    """Three channels, another size, and pixels normalised as its preprocessor says."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    _, tokenizer = tiny_clip(WORDS, SAID, 8, 4)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": len(tokenizer), "eos_token_id": 3, "max_position_embeddings": 16},
        vision_config={**shape, "image_size": 12, "patch_size": 4}, projection_dim=8,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    teacher = PromptClassifier.load(tmp_path, WORDS, channels=1)
    images = torch.full((2, 1, 8, 8), -1.0)
    images[1] = 0.5
    levels = torch.tensor([0.0, 0.75])
    pixels = ((levels[:, None] - torch.tensor(mean)) / torch.tensor(std))[:, :, None, None].expand(-1, -1, 12, 12)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels).pooler_output
        torch.testing.assert_close(teacher.image_features(images), expected, atol=1e-5, rtol=1e-4)
    assert teacher(images).shape == (2, C)
    with pytest.raises(UserError, match="images have 2 channels"):
        PromptClassifier.load(tmp_path, WORDS, channels=2)
    with pytest.raises(UserError, match="knows no classes of its own"):
        ImageClassifier.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        PromptClassifier.load(tmp_path, WORDS)


def test_captions_teach_a_text_image_model() -> None:
    torch.manual_seed(0)
    shown, label = randn(C, 1, 8, 8).sign(), torch.arange(300) % C
    images = shown[label] + 0.3 * randn(300, 1, 8, 8, seed=1)
    model = PromptClassifier(*tiny_clip(WORDS, SAID, 8, 4, width=16), WORDS)
    train_clip(model, images, label, SAID, seed=0, steps=40, lr=5e-3)
    with torch.no_grad():
        assert float((model(shown[label] + 0.3 * randn(300, 1, 8, 8, seed=2)).argmax(-1) == label).float().mean()) > 0.9


def test_text_features_start_the_heads(clip: PromptClassifier) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, C))
    method = DHO(DHO.Options(init="both", align="paper", zeta=0.02, prompts=SAID))
    method.build(student, clip)
    heads, wanted = two_heads(method.student), copy.deepcopy(clip)
    assert heads is not None
    wanted.ask(SAID, 0.02)
    for rows in (slice(C), slice(C, None)):
        torch.testing.assert_close(heads.weight[rows].detach(), wanted.text)
    assert (heads.align, heads.zeta) == ("paper", 0.02)
    assert method.teacher.zeta == 0.02


def test_a_cache_adds_the_labels_of_like_images() -> None:
    features = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.6, 0.8]])
    cache = FewShotCache(features, torch.tensor([0, 1, 1]), C, strength=2.0, sharpness=3.0)
    torch.testing.assert_close(cache.keys.norm(dim=-1), torch.ones(3))
    found = cache(torch.tensor([[1.0, 0.0]]))  # cosines 1, 0 and 0.6
    wanted = torch.tensor([[2.0, 2 * math.exp(-3.0) + 2 * math.exp(-1.2), 0.0]])
    torch.testing.assert_close(found, wanted)


def small(n: int = N) -> ArrayData:
    """Images for ``clip``."""
    generator = torch.Generator().manual_seed(0)
    images, label = torch.randn(n, 1, 8, 8, generator=generator).clamp(-1, 1), torch.arange(n) % C
    whole = ArrayData(images, {"label": label}, CLASSES)
    whole.parts["heldout"] = ArrayData(images[:12].clone(), {"label": label[:12]}, CLASSES)
    return whole


def few_shot(clip: PromptClassifier, folder: Path | None = None, stop: int = 0, **more: Any) -> Trainer:
    method = DHO(DHO.Options(**{"labelled": 2, "conflict_every": 0, "cache": "tuned", "cache_share": 1.0, **more}))
    torch.manual_seed(5)
    method.build(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, C)), clip)
    config = EngineConfig(steps=8, batch=6, checkpoint_every=1, log_every=1, check_freezing=True)
    run = Trainer(method, small(), config, folder, folder is not None and not stop, show=False)
    return fitted(run, stop)


def test_a_few_shot_teacher_is_tuned_first_and_then_teaches(clip: PromptClassifier) -> None:
    run = few_shot(clip)
    method, labelled = run.method, run.data.parts["labelled"]
    assert isinstance(method, DHO)
    assert [row["step"] for row in run.history if "loss/adapt/label" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in run.history if "loss/distil/teacher" in row] == [5, 6, 7, 8]
    teacher, cache = method.teacher, method.cache
    assert cache is not None
    assert all(torch.equal(value, teacher.clip.state_dict()[key]) for key, value in clip.clip.state_dict().items())
    with torch.no_grad():
        features = F.normalize(teacher.image_features(labelled.images()), dim=-1)
        assert 1e-4 < float((cache.keys - features).abs().max()) < 0.1  # four steps at a rate of 1e-3
        images, nothing = randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
        seen = F.normalize(teacher.image_features(images), dim=-1)
        near = (5.5 * (seen @ cache.keys.T - 1)).exp() @ F.one_hot(labelled.labels, C).float()
        torch.testing.assert_close(method.taught(images, nothing, nothing), teacher(images) + near)
    fixed = few_shot(clip, cache="fixed").method
    assert isinstance(fixed, DHO)
    assert fixed.cache is not None
    torch.testing.assert_close(fixed.cache.keys.detach(), features)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_few_shot_run_ends_with_the_same_weights(clip: PromptClassifier, tmp_path: Path, step: int) -> None:
    straight = few_shot(clip)
    few_shot(clip, tmp_path, stop=step)
    resumed = few_shot(clip, tmp_path)
    ours, theirs = resumed.method.state_dict(), straight.method.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_cache_wants_a_text_image_teacher_that_is_asked_live(clip: PromptClassifier) -> None:
    with pytest.raises(UserError, match=r"options\.cache needs a text-image teacher"):
        DHO(DHO.Options(cache="tuned")).build(network(), network(1))
    with pytest.raises(UserError, match=r"options\.stored keeps the answers of a teacher that options\.cache changes"):
        DHO(DHO.Options(cache="fixed", stored="outputs", views=2)).build(network(), clip)


# --- runs -------------------------------------------------------------------------------------------------------------
FAST = [
    "engine.steps=6",
    "engine.batch=6",
    "engine.log_every=1",
    "engine.warmup=0",
    "evaluate.n=5",
    "options.labelled=2",
]


@pytest.mark.parametrize("align", ["none", "paper"])
def test_a_student_is_loaded_with_its_mixture(tmp_path: Path, align: str) -> None:
    from transformers import AutoModelForImageClassification

    read = make_data(tmp_path / "data")
    torch.manual_seed(0)
    PromptClassifier(*tiny_clip(CLASSES, SAID, 8, 4, width=16), CLASSES).save(tmp_path / "clip")
    options = [*FAST, f"options.align={align}", "options.prompts=['a {}.']"]
    recipe = Recipe.load("dho", options, data=str(read), teacher=str(tmp_path / "clip"))
    result = run(recipe, tmp_path / "run")
    assert set(result.scores) == {"student", "teacher-1"}
    again, images = sr.load(tmp_path / "run" / "student"), torch.randn(5, 1, 8, 8)
    assert isinstance(again, ImageClassifier)
    assert again.classes == list(CLASSES)
    assert isinstance(again.sampler, TwoHeadPass)
    assert again.sampler == result.student.sampler
    torch.testing.assert_close(again.probabilities(images), result.student.probabilities(images))
    a, b = again.network(images).logits.detach().chunk(2, -1)
    mixed = mix_heads(a, b, again.sampler.alpha, again.sampler.temperature)
    torch.testing.assert_close(again.probabilities(images), mixed)
    assert set(again.classify(images)) <= set(CLASSES)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "student", local_files_only=True)
    assert theirs.config.num_labels == 2 * C
    torch.testing.assert_close(theirs(images).logits[:, :C].detach(), a)
    if align == "paper":
        return
    further = Recipe.load("dho", options[:-2], data=str(read), teacher=str(tmp_path / "run" / "student"))
    assert run(further, tmp_path / "further").student.probabilities(images).shape == (5, C)


def test_the_teachers_of_the_bench_err_as_they_should() -> None:
    bench = SemiDigitsBench(seed=100)
    assert (bench.train.n, bench.held_out.n, bench.test.n) == (1000, 200, 597)
    assert bench.data(1000).labels.equal(bench.clean.labels)
    teacher = bench.teacher("biased")
    with torch.no_grad():
        said = teacher(bench.test.images()).argmax(-1)
    truth = bench.test.labels
    assert float((said[truth == 4] == 9).float().mean()) > 0.5
    assert float((said[truth == 0] == 0).float().mean()) > 0.9
    with pytest.raises(UserError, match="did you mean 'biased'"):
        bench.teacher("biassed")
    given = get_bench("digits-semi", 100).given(teacher="untrained")
    assert isinstance(given["student"], nn.Module)
    assert not torch.equal(given["teacher"](bench.test.images()), teacher(bench.test.images()))


def test_the_shipped_text_image_teacher_knows_clothes() -> None:
    bench: Any = get_bench("fashion-semi", 100)
    given = bench.given()
    student, teacher = given["student"], given["teacher"]
    images, truth = bench.test.images(slice(300)), bench.test.labels[:300]
    with torch.no_grad():
        assert float((teacher(images).argmax(-1) == truth).float().mean()) > 0.75
        assert student.eval()(images[:2]).logits.shape == (2, 10)
    assert torch.equal(bench.data().labels, bench.clean.labels)
    with pytest.raises(UserError, match="knows no classes of its own"):
        sr.load("fashion-clip")


def test_a_proof_may_compare_health_numbers_and_name_a_teacher() -> None:
    bench: Any = get_bench("digits-semi", 100)
    engine = {"steps": 6, "batch": 12, "log_every": 1}
    arm = Arm("a", "dho", {"labelled": 1, "conflict_every": 1}, engine, teacher="untrained")
    result = run_arm(arm, bench)
    mean = score(result, "health/gradient_cosine")
    low, high = result["health"]["health/gradient_cosine"]
    assert -1 <= low < mean < high <= 1
    network, tuned, _ = train_arm(arm, bench)
    held_out = bench.held_out
    logits = network.eval()(held_out.images()).detach()
    assert tuned == TwoHeadPass(*best_mixture(*logits.chunk(2, -1), held_out.labels))
    untouched = run_arm(arm.with_("b", engine={"steps": 0}), bench)
    assert math.isnan(score(untouched, "health/gradient_cosine"))
    claim = Claim("c", "", "", "health/gradient_cosine", "a", ">=", right="b")
    assert not claim.holds(0.5, math.nan)
    with pytest.raises(UserError, match="no teacher 'nobody'"):
        run_arm(arm.with_("d", teacher="nobody"), bench)
