"""LightGen: a small masked-autoregressive generator learns from big teachers' images, then from preferences (arXiv
2503.08619)."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stillroom.data.synthetic import SynthesisOptions
from stillroom.diffusion.masking import TEXT, MaskedSampler, MaskRatio, random_orders
from stillroom.errors import UserError
from stillroom.evaluation.filters import make_filters
from stillroom.losses import preference
from stillroom.losses.preference import dpo_loss
from stillroom.method import Batch, Method, Optim, Paper, Stage, Terms, register, turn
from stillroom.networks.mar import MAR, MARSettings

if TYPE_CHECKING:
    from stillroom.networks.text_image_space import TextImageSpace

OPTIM = {"betas": (0.9, 0.99), "weight_decay": 0.02, "clip_norm": 3.0}
SMALL, PAIRS = "small", "pairs"
"""Parts of the data: the images at a lower resolution, and the real pictures with captions."""
DRAWN_AT_ONCE = 64


@register(
    "lightgen",
    Paper(
        title="LightGen: Efficient Image Generation through Knowledge Distillation and Direct Preference Optimization",
        arxiv="2503.08619",
        year=2025,
        code="XianfengWu01/LightGen",
    ),
)
class LightGen(Method):
    """Text-to-image teachers are known by their images alone (data distillation: ``stillroom synthesize``). A
    masked-autoregressive network learns these at a low resolution, adapts to the full one, and is mended by direct
    preference optimisation, real pictures against its own samples for the same captions.

    An image's latents are cut into tokens x_i. Of a random order the first n = ceil(r N) are masked (M), r from
    ``mask_ratio``, one for the whole batch; the network makes a condition z_i of each from the visible tokens and the
    text, and its diffusion head learns to denoise x_i under it, t and eps drawn for every masked token:

        L(x) = mean_(i in M), (t, eps) |eps - eps_theta(x_i,t; t, z_i)|^2  (+ l_vb)           eq. 6
        Delta = [L_theta(w) - L_ref(w)] - [L_theta(l) - L_ref(l)],    L without l_vb
        L_DPO = -mean log sigmoid(-beta/2 Delta)  +  anchor L_theta(w)                         eq. 7

    l_vb trains the head's variance alone. w and l, the winner and the loser of a pair, theta and the reference see the
    same masks, orders, times and noise; the reference, the student as it enters the last stage, has no gradient. With
    several rounds (``dpo_rounds``) that stage begins anew in each: a new reference draws new pairs.

    Departures: the text stack runs for the masked tokens only (they do not see each other there, so no
    number changes); the preference loss may be anchored to the winners (``anchor``; 0 is the paper's loss); winners may
    be own samples that a judge keeps (``winners``), since real pictures differ from own samples in more than obedience;
    pairs may be drawn anew in rounds (``dpo_rounds``; the authors draw theirs once);
    images are not mirrored unless asked for, since that makes "left" and "right" mean nothing.
    """

    task = "text-images"

    @dataclass
    class Options:
        network: MARSettings = MARSettings()
        # The images that teachers draw before the training, and how images are encoded.
        synthesis: SynthesisOptions = field(default_factory=SynthesisOptions, metadata={"later": True})
        # Shares of the steps; 0 leaves a stage out. pretrain reads the data's part "small" where there is one.
        pretrain_share: float = field(default=0.8, metadata={"min": 0})
        adapt_share: float = field(default=0.1, metadata={"min": 0})
        dpo_share: float = field(default=0.1, metadata={"min": 0})  # reads the data's part "pairs"
        adapt_lr: float = field(default=0.1, metadata={"min": 0})  # factor on the learning rate of pretrain
        mask_ratio: MaskRatio = MaskRatio()
        repeats: int = field(default=4, metadata={"min": 1})  # draws of (t, eps) per token
        text_drop: float = field(default=0.1, metadata={"min": 0, "max": 1})
        mirror: float = field(default=0.0, metadata={"min": 0, "max": 1})  # probability; the paper's is 0.5
        preference: Literal["dpo", "sft"] = "dpo"  # "sft" trains on the winners alone: the control that the paper lacks
        losers: Literal["own", "mirrored"] = "own"  # the student's own samples, or the winners' mirror images
        # "own": own samples that `judge` keeps, against own that it rejects
        winners: Literal["real", "own"] = field(default="real", metadata={"later": True})
        # a filter by name, as in options.synthesis.filters
        judge: str = field(default="parser", metadata={"later": True})
        # own samples of a caption, among which both are sought: best of n, where the judge says yes or no
        tries: int = field(default=4, metadata={"later": True, "min": 2})
        loser_round_trip: bool = True  # own samples become pictures and are encoded again, as the winners were
        # parts of the last stage, each with a reference and own samples of its own
        dpo_rounds: int = field(default=1, metadata={"later": True, "min": 1})
        swap_labels: float = field(default=0.0, metadata={"min": 0, "max": 1})  # share of pairs: the negative control
        beta: float = field(default=5000.0, metadata={"min": 0})
        anchor: float = field(default=0.0, metadata={"min": 0})  # gamma; 0 is the paper's loss
        # How the student is run, for its own samples of the last stage too.
        steps: int = field(default=64, metadata={"min": 1})
        guidance: float = 4.0
        guidance_schedule: Literal["constant", "linear"] = "constant"
        temperature: float = field(default=1.0, metadata={"min": 0})
        head_steps: int = field(default=100, metadata={"min": 1, "max": 1000})
        clip: float = field(default=0.0, metadata={"min": 0})  # bound of the head's x0; 0: none

    options: Options
    health = {
        "masked_loss": "L(x) without l_vb; in the stage of preferences that of the winners",
        "z_rms": "root mean square of the conditions z_i: falls towards 0 where the head learns to do without them",
        **preference.HEALTH,
    }

    def build(self, space: TextImageSpace, student: MAR | None = None) -> None:
        o, codec = self.options, space.codec
        if o.pretrain_share + o.adapt_share + o.dpo_share == 0:
            raise UserError("every stage of lightgen has share 0", cure="set options.pretrain_share to 1, for example")
        if o.winners == "own" and o.losers != "own":
            raise UserError(
                f"options.winners=own is for own losers, not for losers={o.losers}", cure="set options.winners to real"
            )
        height, width = codec.grid(space.size)
        patch = o.network.patch or 2
        if height % patch or width % patch:
            raise UserError(
                f"options.network.patch={patch} does not divide the latents of {height}x{width}",
                cure="choose a patch that divides both sides",
            )
        self.space, self.parts = space, ()
        self.student = o.network.make(
            channels=codec.channels, text_width=space.text.width, grid=(height // patch, width // patch)
        )
        if student is not None:
            self.take_over(student)
        if self.draws_pairs:
            # Not frozen(): its weights are those that training had reached, which a checkpoint must keep.
            self.reference = copy.deepcopy(self.student).requires_grad_(False).eval()

    def take_over(self, start: nn.Module) -> None:
        """Begin with the weights of a finished student of the same sizes, whose head predicts the same."""
        ours = self.student.config["prediction"]
        theirs = start.config["prediction"] if isinstance(start, MAR) else ours  # other classes fail below
        if theirs != ours:
            raise UserError(
                f"the head of the student that is given predicts {theirs}, that of options.network {ours}",
                cure=f"set options.network.prediction={theirs}",
            )
        try:
            self.student.load_state_dict(start.state_dict())
        except RuntimeError:
            raise UserError(
                "the student that is given has other sizes than options.network",
                cure="give its own sizes (transformer/config.json or network/config.json) as options.network",
            ) from None

    @property
    def draws_pairs(self) -> bool:
        """Whether the last stage reads samples of the student as it stood: a reference draws them."""
        o = self.options
        return o.dpo_share > 0 and (o.preference == "dpo" or o.winners == "own")

    def prepare(self, data: Any) -> None:
        self.parts = tuple(getattr(data, "parts", ()))
        if data.shape[0] != self.student.channels:
            raise UserError(
                f"the data's latents have {data.shape[0]} channels, the student's {self.student.channels}",
                cure="encode the images with the codec that the student is built for",
            )

    def stages(self) -> tuple[Stage, ...]:
        """Low resolution, full resolution, preferences; what a share of 0 leaves of them."""
        o, small = self.options, SMALL if SMALL in self.parts else ""
        last = "prefer" if o.preference == "dpo" else "finetune"
        name, rounds, whole = o.preference, o.dpo_rounds, {"data": PAIRS, "own_schedule": True, "kind": o.preference}
        every = (
            Stage("pretrain", ("masked",), o.pretrain_share, small, own_schedule=True),
            Stage("adapt", ("masked",), o.adapt_share, lr=o.adapt_lr, own_schedule=True),
            *(
                Stage(f"{name} {number}" if rounds > 1 else name, (last,), o.dpo_share / rounds, round=number, **whole)
                for number in range(rounds)
            ),
        )
        return tuple(stage for stage in every if stage.share > 0)

    def decays(self, name: str, parameter: Tensor) -> bool:
        """No weight decay for biases, norms and the whole diffusion head."""
        return parameter.ndim > 1 and not name.startswith("student.head.")

    # --- masked training ------------------------------------------------------------------------------------------
    def latents(self, batch: Batch, mirror: float = 0.0) -> Tensor:
        """Mirrored or not, the codec's posterior sampled afresh, ``[B, C, H, W]``."""
        mean, std = batch["x"], batch.get("std")
        if mirror:
            if "mirrored" not in batch:
                raise UserError(
                    "options.mirror needs mirrored images in the data", cure="set options.synthesis.mirror to true"
                )
            flip = (self.draw.uniform(len(mean)) < mirror)[:, None, None, None]
            mean = torch.where(flip, batch["mirrored"], mean)
            std = None if std is None else torch.where(flip, batch["mirrored_std"], std)
        return mean if std is None else mean + std * self.draw.normal_like(mean)

    def randomness(self, x: Tensor) -> dict[str, Any]:
        """Orders, ONE mask ratio for the batch, and times and noise for every masked token."""
        rows, columns = self.student.grid_of(x)
        masked = self.options.mask_ratio.sample(self.draw, rows * columns)
        shape = (len(x), self.options.repeats, masked)
        steps = self.student.head.process.steps
        return {
            "order": random_orders(self.draw, rows * columns),
            "masked": masked,
            "t": (self.draw.uniform(*shape) * steps).long().clamp_max(steps - 1),
            "eps": self.draw.normal(*shape, self.student.token_dim),
        }

    def masked_terms(self, batch: Batch, mirror: float) -> Terms:
        """``L(x)`` (eq. 6): the sum over masked tokens and draws, over their number."""
        x = self.latents(batch, mirror)
        drop = self.draw.uniform(len(x)) < self.options.text_drop
        loss = self.student(x, batch["cond"][TEXT], **self.randomness(x), drop=drop)
        self.note("masked_loss", loss.mse.mean())
        self.note("z_rms", loss.z.float().square().mean().sqrt())
        terms = {"mse": loss.mse.mean()}  # one number of masked tokens for all samples: a mean of means is the mean
        if loss.vb is not None:
            terms["vb"] = loss.vb.mean()
        return terms

    @turn(trains="student", optim=Optim(lr=1e-4, **OPTIM))
    def masked(self, batch: Batch) -> Terms:
        return self.masked_terms(batch, self.options.mirror)

    # --- preferences ----------------------------------------------------------------------------------------------
    @turn(trains="student", optim=Optim(lr=1e-8, **OPTIM))
    def prefer(self, batch: Batch) -> Terms:
        """``L_DPO`` (eq. 7): winner and loser, student and reference, under the same randomness."""
        for network in (self.student, self.reference):
            network.eval()  # no dropout: a loss that jitters by 1e-3 moves the logit by 2.5
        batch = self.won(batch)
        win, std = batch["x"], batch.get("std")
        lose = batch["loser"].to(win)
        if std is not None:
            noise = self.draw.normal_like(win)
            win, lose = win + std * noise, lose + batch["loser_std"].to(noise) * noise
        swap = batch["swapped"][:, None, None, None]
        win, lose = torch.where(swap, lose, win), torch.where(swap, win, lose)
        shared = {
            name: value if name == "masked" else value.repeat(2, *[1] * (value.ndim - 1))
            for name, value in self.randomness(win).items()
        }
        # Dropping no text in so many words keeps the null text in the graph, and so its weight decay and momentum.
        shared["drop"] = torch.zeros(len(win), dtype=torch.bool, device=win.device)
        both, text = torch.cat([win, lose]), batch["cond"][TEXT]
        with torch.no_grad():
            ref_win, ref_lose = self.reference(both, text, **shared).mse.chunk(2)
        policy_win, policy_lose = self.student(both, text, **shared).mse.chunk(2)
        terms, health = dpo_loss(policy_win, policy_lose, ref_win, ref_lose, self.options.beta, self.options.anchor)
        for name, value in health.items():
            self.note(name, value)
        self.note("masked_loss", policy_win.mean())
        return terms

    def won(self, batch: Batch) -> Batch:
        """The batch with the winners in the place of the real pictures."""
        if self.options.winners == "real":
            return batch
        x = batch["x"]
        return {**batch, "x": batch["winner"].to(x), "std": batch["winner_std"].to(x)}

    @turn(trains="student", optim=Optim(lr=1e-5, **OPTIM))
    def finetune(self, batch: Batch) -> Terms:
        """The control: masked training goes on, on the winners, which are not mirrored."""
        return self.masked_terms(self.won(batch), mirror=0.0)

    @torch.no_grad()
    def enter(self, stage: Stage, data: Any, resumed: bool) -> dict[str, Tensor] | None:
        """The student as it stands becomes the reference, which draws the losers (and own winners), once a round: part
        of the stage's data from then on."""
        if stage.kind != self.options.preference or not self.draws_pairs or resumed:
            return None
        for mine, theirs in zip(self.reference.parameters(), self.student.parameters(), strict=True):
            mine.copy_(theirs)
        generator, device = self.draw.generator, self.draw.generator.device
        made = {"swapped": torch.rand(data.n, generator=generator, device=device) < self.options.swap_labels}
        every = torch.arange(data.n).split(DRAWN_AT_ONCE)
        if self.options.winners == "own":
            pairs = [self.judged(data, rows, device) for rows in every]
            made["winner"], made["winner_std"] = joined([win for win, _ in pairs])
            made["loser"], made["loser_std"] = joined([lose for _, lose in pairs])
            if torch.equal(made["winner"], made["loser"]):
                raise UserError(
                    f"of none of {data.n} captions the judge {self.options.judge!r} keeps one of "
                    f"{self.options.tries} own samples and rejects another",
                    cure="raise options.tries, or set options.winners to real",
                )
            if self.options.preference == "sft":
                del made["loser"], made["loser_std"], made["swapped"]
        else:
            made["loser"], made["loser_std"] = joined([self.draw_losers(data, rows, device) for rows in every])
        return made

    def draw_losers(self, data: Any, rows: Tensor, device: torch.device) -> Moments:
        """Moments of the losers of these pairs."""
        codec = self.space.codec.to(device)
        if self.options.losers == "mirrored":
            return encoded(codec, codec.decode(data.mean[rows].float()).flip(-1))
        latents = self.draw_own(data, rows, device)
        return encoded(codec, codec.decode(latents)) if self.options.loser_round_trip else (latents, 0 * latents)

    def draw_own(self, data: Any, rows: Tensor, device: torch.device) -> Tensor:
        """Latents that the reference draws for the captions of these pairs."""
        generator = self.draw.generator
        noise = torch.randn(len(rows), *data.shape, generator=generator, device=device)
        cond = {TEXT: data.text[TEXT][data.which[rows]].float().to(device)}
        return self.sampler().sample(self.reference, noise, cond, generator)

    def judged(self, data: Any, rows: Tensor, device: torch.device) -> tuple[Moments, Moments]:
        """Moments of the first of some own samples that the judge keeps and of the first that it rejects. Where one of
        them is missing, both are the same (the real picture, if the judge kept none): such a pair prefers nothing."""
        (judge,), codec = make_filters([self.options.judge]), self.space.codec.to(device)
        captions = [data.captions[i] for i in data.which[rows].tolist()]
        real = data.mean[rows].to(device).float()
        win = lose = (real, torch.zeros_like(real) if data.std is None else data.std[rows].to(real))
        no_win = no_lose = torch.ones(len(rows), dtype=torch.bool, device=device)
        for _ in range(self.options.tries):
            images = codec.decode(self.draw_own(data, rows, device)).clamp(-1, 1)
            kept = torch.tensor([judge.keeps(score) for score in judge(images.cpu(), captions)], device=device)
            drawn = encoded(codec, images)
            win, lose = chosen(kept & no_win, drawn, win), chosen(~kept & no_lose, drawn, lose)
            no_win, no_lose = no_win & ~kept, no_lose & kept
        return win, chosen(no_win | no_lose, win, lose)

    def sampler(self) -> MaskedSampler:
        o = self.options
        return MaskedSampler(o.steps, o.guidance, o.guidance_schedule, o.temperature, o.head_steps, o.clip)


Moments = tuple[Tensor, Tensor]
"""Means and standard deviations of latents, ``[B, C, H, W]`` each."""


def encoded(codec: Any, images: Tensor) -> Moments:
    """Moments of images rounded to 8 bits, as the winners had."""
    return codec.moments(((images + 1) * 127.5).round() / 127.5 - 1)


def chosen(rows: Tensor, yes: Moments, no: Moments) -> Moments:
    """Those of ``yes`` in the ``rows`` (bool ``[B]``), those of ``no`` elsewhere."""
    at = rows[:, None, None, None]
    return torch.where(at, yes[0], no[0]), torch.where(at, yes[1], no[1])


def joined(parts: list[Moments]) -> Moments:
    """All rows, at the precision that winners are kept at: it must not tell them apart."""
    return torch.cat([mean.half() for mean, _ in parts]), torch.cat([std.half() for _, std in parts])
