"""What to ask of a memory, and how the answer is scored: one file a task.

A task is data with a version: change what it asks or how it scores, and raise the version, so that old
and new results are not taken for the same. `TASKS` is the list of all.
"""

from __future__ import annotations

from functools import partial

from transformerfam.tasks import babilong, documents, facts, gpt3, longqa, passkey, recall, ruler
from transformerfam.tasks.cases import Case, Task, Wanted

__all__ = ["TASKS", "Case", "Task", "Wanted"]

_FIGURE_10 = "TransformerFAM, figure 10"
_RULER = "RULER, arXiv 2404.06654"
_BABILONG = "BABILong, arXiv 2406.10149"
_ABOUT_PASSKEY = {
    "passkey": "a number at the start of the text",
    "passkey-middle": "a number in the middle",
    "passkey-late": "a number near the end",
    "passkey-anywhere": "a number anywhere",
    "passkey-3": "three numbers anywhere, of which one is asked for",
}
_ABOUT_FACTS = {
    "facts": "who lives where, what was hidden where, and the like, told at the start",
    "facts-anywhere": "the same, told anywhere",
}
_ABOUT_BABILONG = {
    "qa1": "where someone is, by one fact",
    "qa2": "where a thing is, by two facts",
    "qa3": "where a thing was before, by three facts",
    "qa4": "what is where, by relations of two",
    "qa5": "who gave what to whom",
}
_ABOUT_RULER = {
    "niah": "the number of a word",
    "niah-multikey": "the number of one word of four",
    "niah-multivalue": "all four numbers of a word",
    "vt": "all names of a value, through a chain of assignments",
    "cwe": "the ten words that are listed most often",
}
_ABOUT_LONGQA = {
    "narrativeqa": ("questions about stories and scripts", "NarrativeQA, arXiv 1712.07040"),
    "qasper": ("questions about research papers", "Qasper, as in SCROLLS"),
    "quality": ("questions with four options about stories", "QuALITY, as in SCROLLS"),
    "xlsum": ("summaries of news", "XL-Sum, arXiv 2106.13822"),
    "longqa": ("questions and summaries in rows as of L-Eval", "L-Eval, arXiv 2307.11088"),
}

_ABOUT_GPT3 = {
    "gpt3-arc-easy": ("easy questions of school science, with options", "ARC, arXiv 1803.05457"),
    "gpt3-arc-challenge": ("hard ones, with options", "ARC, arXiv 1803.05457"),
    "gpt3-openbookqa": ("elementary science, with options", "OpenBookQA, arXiv 1809.02789"),
    "gpt3-piqa": ("how things are done, of two ways", "PIQA, arXiv 1911.11641"),
    "gpt3-winograd": ("who is meant, of two", "Winograd schemas, as GPT-3 asks them"),
    "gpt3-winogrande": ("who or what is meant, of two", "WinoGrande, arXiv 1907.10641"),
    "gpt3-lambada": ("the last word of a passage", "LAMBADA, arXiv 1606.06031"),
    "gpt3-triviaqa": ("facts, without a text", "TriviaQA, arXiv 1705.03551"),
}

TASKS: dict[str, Task] = {
    **{n: Task(partial(passkey.cases, n), a, _FIGURE_10) for n, a in _ABOUT_PASSKEY.items()},
    **{
        n: Task(partial(facts.cases, n), a, "PassKey, in plain words")
        for n, a in _ABOUT_FACTS.items()
    },
    "recall": Task(recall.cases, "a segment of the text, said again", "B.2's repeat task, asked"),
    **{
        f"babilong-{n}": Task(partial(babilong.cases, n), a, _BABILONG)
        for n, a in _ABOUT_BABILONG.items()
    },
    **{f"ruler-{n}": Task(partial(ruler.cases, n), a, _RULER) for n, a in _ABOUT_RULER.items()},
    "documents": Task(
        documents.cases, "every token of whole documents, by place", "figure 5, table 1"
    ),
    **{n: Task(partial(longqa.cases, n), a, s) for n, (a, s) in _ABOUT_LONGQA.items()},
    **{n: Task(partial(gpt3.cases, n), a, s) for n, (a, s) in _ABOUT_GPT3.items()},
}
