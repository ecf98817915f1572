"""The tables and figures of the paper that toys are trained for: what is compared, and what is claimed.

A claim says that one variant does better than another. It is judged on our own numbers, seed by seed;
the paper's stand beside it. Machine measurements, drawings and shapes are in `machine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformerfam.reproduction.experiment import Experiment, Shape, Variant


@dataclass(frozen=True)
class Claim:
    """`more` does better than `less`.

    Attributes:
        more, less: variants.
        asked: by which question; empty: the experiment's first.
        within: over the lengths of training too; else only over longer ones.
        paper: whether the paper finds so; None: it does not say.
    """

    more: str
    less: str
    asked: str = ""
    within: bool = False
    paper: bool | None = True


@dataclass(frozen=True)
class Item:
    """A table or figure.

    Attributes:
        title: what it is in the paper.
        about: what is compared here, in place of what the paper compares.
        experiment: what is trained and asked.
        claims: what is judged.
        paper: tables of the paper to show beside it.
        said: what the paper says of a curve that has no printed values.
        tuned: whether the paper trains it on its mix of instructions (section 3.1), with three past
            blocks, where a toy has PassKey.
    """

    title: str
    about: str
    experiment: Experiment
    claims: tuple[Claim, ...] = ()
    paper: tuple[str, ...] = ()
    said: str = ""
    tuned: bool = False


def _windows(segments: int, **more: Any) -> dict[str, Any]:
    return {"memory_segments": segments, "fam_length": 0, **more}


def _fam(**more: Any) -> dict[str, Any]:
    return {"memory_segments": 0, "fam_length": 8, "feedback_norm": "rms", **more}


_SHAPE = Shape(width=64, layers=2, block=16, digits=2, rows=32)
_OPTIMIZER: Mapping[str, Any] = {
    "learning_rate": 2e-3,
    "weight_decay": 0.3,
    "schedule": "cosine",
}
_FAR = (2, 3, 4, 8, 16, 32, 64, 150, 300, 600, 1024)
_NEAR = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

# Table 4's memory of PassKey: 64 slots and no segments. A toy has 8 slots, and its FAM is rescaled,
# without which so small a model learns nothing.
FAM = Variant("FAM", _fam())
M0, M1, M2, M4 = (Variant(f"M{m}", _windows(m)) for m in (0, 1, 2, 4))

_ABLATION = Experiment(
    variants=(),
    asked=("1 start",),
    steps=400,
    longest=3,
    lengths=_NEAR,
    shape=_SHAPE,
    optimizer=_OPTIMIZER,
)


def _ablation(*variants: Variant, **changes: Any) -> Experiment:
    return replace(_ABLATION, variants=variants, **changes)


_PASSKEY = "Toy PassKey: a key in the first block, then random filler; trained on 2 and 3 blocks."
_PASSING = {"state_passing": 0.5, "state_passing_delay": 750}
_SMALL = {"memory_segments": 0, "fam_length": 4}

_LIGHT = Variant("FAM, decay 0.3", _fam(), steps=1000)
# A decay of 3 keeps logits small and the loss from ending at 0: what is written has to stand out of all
# else that is in FAM, and then it stands long. Windows learn nothing with it.
_HEAVY = Variant("FAM, decay 3", _fam(), optimizer={"weight_decay": 3.0}, steps=2000)
# Rescaled to 3, F has a third of an update's weight in what it is: it holds longer.
_LONG = replace(_HEAVY, name="FAM", fam=_fam(feedback_rms=3.0))
_FIGURE_3A = _ablation(
    M0,
    # The others are where they stay after some hundred steps; not so without a gradient.
    Variant("M1_SG", _windows(1, stop_gradient=True), steps=1000),
    *(M1, M2, M4, _LIGHT, _LONG),
    lengths=_FAR,
)

ITEMS: dict[str, Item] = {
    "figure3a": Item(
        title="Figure 3a: PassKey by length, windows and FAM",
        about=_PASSKEY
        + " Windows are trained for 400 steps, M1_SG and FAM under a decay of 0.3 for "
        "1,000, and FAM, under a decay of 3 and rescaled to a root mean square of 3, for 2,000.",
        said="FAM stays at accuracy 1.0 to 260k tokens, trained on fillers of 2k to 18k. Windows get "
        "better up to two memory segments and then no more; a stopped gradient (M1_SG) reaches hardly "
        "past its window, and with its gradient M1 reaches further.",
        experiment=_FIGURE_3A,
        claims=(
            Claim("M1", "M1_SG", within=True),
            Claim("M2", "M1"),
            Claim("M4", "M2", paper=False),
            Claim("FAM", "M4"),
        ),
    ),
    "holding": Item(
        title="How long FAM holds: weight decay and rescaling, which the paper does not vary",
        about=_PASSKEY
        + " FAM is that of figure 3a, with a decay of 3, and rescaled to a root mean "
        "square of 3, not 1. Under a decay of 3 it is trained for 2,000 steps, else for 1,000.",
        experiment=replace(_FIGURE_3A, variants=(_LIGHT, _HEAVY, _LONG)),
        claims=(Claim("FAM", "FAM, decay 3", paper=None),),
    ),
    "anywhere": Item(
        title="Keys anywhere, and three of them: what PassKey does not ask",
        about="Toy PassKey with one key or three, each in any block, trained on 2 to 6 blocks; asked "
        "when they were seen in the first blocks and when they were seen late.",
        experiment=Experiment(
            variants=(
                Variant("FAM", _SMALL),
                Variant("FAM, rms", {**_SMALL, "feedback_norm": "rms"}),
                Variant("FAM, passing", _SMALL, _PASSING),
                Variant("FAM, rms, passing", {**_SMALL, "feedback_norm": "rms"}, _PASSING),
            ),
            trained=("1 anywhere", "3 anywhere"),
            asked=("1 late", "1 start", "3 late", "3 start"),
            steps=1500,
            longest=6,
            lengths=_FAR,
            shape=_SHAPE,
            optimizer=_OPTIMIZER,
        ),
        claims=(
            Claim("FAM, rms", "FAM", "1 late", paper=None),
            Claim("FAM, rms", "FAM", "1 start", paper=None),
            Claim("FAM, passing", "FAM", "1 late", paper=None),
            Claim("FAM, rms, passing", "FAM, rms", "1 late", paper=None),
        ),
    ),
    "table5": Item(
        title="Table 5: FAM length",
        about=_PASSKEY,
        experiment=_ablation(
            *(
                Variant(f"N = {n}", _fam(fam_length=n), paper={"fam_length": paper})
                for n, paper in ((1, 4), (2, 16), (4, 64), (8, 256), (16, 1024))
            )
        ),
        claims=(Claim("N = 4", "N = 1"), Claim("N = 4", "N = 16")),
        paper=("table05_fam_length",),
        tuned=True,
    ),
    "table6": Item(
        title="Table 6: how many past FAMs a block sees",
        about=_PASSKEY,
        experiment=_ablation(
            FAM,
            *(Variant(f"{k} FAMs", _fam(previous_fams=k)) for k in (2, 3, 4, 6)),
        ),
        claims=(Claim("FAM", "4 FAMs"), Claim("6 FAMs", "FAM")),
        paper=("table06_fam_blocks",),
        tuned=True,
    ),
    "table7": Item(
        title="Table 7: the position of FAM",
        about=_PASSKEY,
        experiment=_ablation(
            FAM,
            Variant("float", _fam(fam_position="float")),
            Variant("zero", _fam(fam_position="zero"), {"position_offset": 0.5}),
            Variant("query at block end", _fam(fam_query_position="block_end")),
        ),
        claims=(Claim("FAM", "float"), Claim("FAM", "zero")),
        paper=("table07_fam_position",),
        tuned=True,
    ),
    "table8": Item(
        title="Table 8: TransformerXL's mask against block sliding windows",
        about=_PASSKEY
        + " The key is the first in its block, and the question the last in its own: the windows of XL "
        "and SWA do not reach from the one to the other, over both layers, and cannot learn it. This "
        "shows how far windows reach, and not, as the paper does, what they cost on texts.",
        experiment=_ablation(
            Variant("BSWA", _windows(1)),
            Variant("XL", _windows(1, attention="xl")),
            Variant("SWA", _windows(1, attention="swa", window=16)),
        ),
        claims=(Claim("BSWA", "XL", within=True, paper=None),),
        paper=("table08_xl",),
        tuned=True,
    ),
    "table9": Item(
        title="Table 9 and figure 9: feedback memory segments, static summaries",
        about=_PASSKEY,
        experiment=_ablation(
            M1,
            M2,
            M4,
            *(Variant(f"FM{m}", _windows(m, memory_source="output")) for m in (1, 2, 4)),
            Variant("SUM FAM", _fam(fam_query="static")),
            FAM,
        ),
        claims=(
            Claim("FM1", "M1"),
            Claim("FM2", "M2"),
            Claim("FM4", "M4"),
            Claim("FAM", "FM4"),
            Claim("FAM", "SUM FAM"),
        ),
        paper=("table09_feedback_memory",),
        said="Figure 9, PassKey: FAM holds; FM1, FM2, FM4 beat M1, M2, M4 and fall well short of FAM; "
        "static summary queries fail.",
    ),
    "figure7": Item(
        title="Figure 7: RMT and AutoCompressors, and two more memories",
        about=_PASSKEY + " Infini-attention and a linear-attention model are not in the paper.",
        experiment=_ablation(
            M1,
            Variant("RMT", {**_SMALL, "fam_length": 8, "recurrence": "rmt"}),
            Variant("AutoCompressors", {**_SMALL, "fam_length": 8, "recurrence": "autocompressor"}),
            Variant(
                "Infini-attention",
                _windows(0, compressive_memory="linear"),
                # Half open: nearly shut gates, which spare a pretrained model, teach a toy nothing.
                model={"gates": 0.0},
            ),
            Variant("linear attention", {}, model={"architecture": "linear"}),
            FAM,
        ),
        claims=(
            Claim("FAM", "M1"),
            Claim("M1", "RMT"),
            Claim("FAM", "RMT"),
            Claim("FAM", "AutoCompressors"),
            Claim("FAM", "Infini-attention", paper=None),
            Claim("FAM", "linear attention", paper=None),
        ),
        said="PassKey: FAM holds to 260k; BSWA with one segment falls earlier; RMT is below BSWA; "
        "AutoCompressors drops sharply after 18k, the longest length trained on.",
    ),
    "figure5": Item(
        title="Figure 5: what FAM needs, by rotary base",
        about=_PASSKEY + " The paper measures PG-19.",
        experiment=_ablation(
            FAM,
            *(
                Variant(f"base {base:,}", _fam(), model={"rope_theta": float(base)})
                for base in (100, 1000, 100_000)
            ),
            Variant("passing 0.5", _fam(), {"state_passing": 0.5, "state_passing_delay": 200}),
            Variant("offset 0.5", _fam(), {"position_offset": 0.5}),
            Variant("zero", _fam(fam_position="zero"), {"position_offset": 0.5}),
            Variant("prefix", _fam(fam_start="prefix")),
        ),
        claims=(
            Claim("passing 0.5", "FAM"),
            Claim("offset 0.5", "FAM"),
            Claim("FAM", "zero"),
            Claim("FAM", "prefix"),
            Claim("FAM", "base 100"),
        ),
        said="PG-19: full FAM is best at base 10k; leaving out random position offset, leaving out "
        "random state passing, FAM at position zero, and prefix instead of prompt are each below it; "
        "leaving out random state passing costs most.",
        tuned=True,
    ),
    "figure6": Item(
        title="Figure 6: how often the state is passed",
        about=_PASSKEY
        + " The state is passed from half of the training on. The paper measures PG-19.",
        experiment=_ablation(
            FAM,
            *(
                Variant(f"p = {p:g}", _fam(), {"state_passing": p, "state_passing_delay": 200})
                for p in (0.2, 0.5, 0.8, 1.0)
            ),
        ),
        claims=(Claim("p = 0.8", "FAM"), Claim("p = 0.8", "p = 1")),
        said="PG-19: best at 0.8.",
        tuned=True,
    ),
    "losses": Item(
        title="C.4 and C.5: diversity and reconstruction losses",
        about=_PASSKEY,
        experiment=_ablation(
            FAM,
            Variant("diversity", _fam(), {"diversity_weight": 0.1}),
            Variant("reconstruction", _fam(), {"reconstruction_weight": 0.1}),
        ),
        claims=(
            Claim("diversity", "FAM", paper=False),
            Claim("reconstruction", "FAM", paper=False),
        ),
        said="Neither helps.",
        tuned=True,
    ),
    "table11": Item(
        title="Tables 1 and 11, figures 3b and 5: whole documents, windows of several sizes and FAM",
        about="Toy prose: the next byte of the Python language reference, trained on stretches of 8 "
        "blocks of 32 bytes. In the first block nobody sees a past: what variants differ by there is "
        "how much they have learned in so few steps, and the wider windows have learned less. Of the "
        "paper's tasks it stands for PG-19 and Isabelle; questions and summaries need a pretrained "
        "model (`fam eval`).",
        experiment=Experiment(
            kind="text",
            variants=(
                M0,
                M1,
                M2,
                M4,
                Variant("M8", _windows(8)),
                Variant("FAM", _fam(memory_segments=1)),
            ),
            asked=("text",),
            steps=300,
            longest=8,
            lengths=(1, 2, 4, 8, 16, 32, 64, 128),
            shape=Shape(width=64, layers=2, block=32, digits=0, rows=16),
            optimizer={"learning_rate": 3e-3, "weight_decay": 0.1, "schedule": "cosine"},
            count=8,
        ),
        claims=(
            Claim("M1", "M0"),
            Claim("M2", "M8"),
            Claim("FAM", "M1"),
            Claim("FAM", "M8"),
        ),
        paper=("table01_lct_8b_24b", "table11_lct_1b"),
        tuned=True,
    ),
}
# Other names of a page: the paper shows the same in several places.
SAME_PAGE = {
    "figure2": "figure1",
    "figure3b": "table11",
    "figure9": "table9",
    "table1": "table11",
    "table4": "table3",
    "table12": "table2",
    "table14": "table13",
}
