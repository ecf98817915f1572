"""A TransformerFAM for lm-evaluation-harness: `lm_eval --model transformerfam`.

    lm_eval --model transformerfam --model_args pretrained=...,block_size=256 --tasks arc_easy

Every request is one stream with one `Memory`, read in chunks, so nothing is cut however long it is.
Texts become tokens exactly as the harness's own Hugging Face backend makes them: without feedback, and
with a window that holds all, scores are its. Knows the harness's requests; nothing of its tasks.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from tqdm import tqdm

from transformerfam.commands._options import changed
from transformerfam.config import FamConfig
from transformerfam.conversion import is_transformerfam, twin
from transformerfam.errors import UserError
from transformerfam.extras import require
from transformerfam.memory import Memory
from transformerfam.models import EMBEDDED, is_trained, load
from transformerfam.readers import readers_of
from transformerfam.side_by_side import score_each
from transformerfam.stream import Sampling, absorb, generate, read
from transformerfam.turns import end_tokens

require("lm_eval", "eval")

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs  # noqa: E402
from lm_eval.models.utils import postprocess_generated_text as cut_at_stops  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

_logger = logging.getLogger(__name__)
_GEOMETRY = {field.name for field in fields(FamConfig)}
# What a request may say about generation; num_beams only if it is 1.
_GENERATION = {"do_sample", "temperature", "top_k", "top_p", "num_beams"}
# A stop text of n bytes is in the last n tokens, or a few more if tokens around it are of no text.
_MORE_TOKENS = 8


class StreamingLM(TemplateLM):
    """A model of the harness that reads in constant memory.

    Args:
        pretrained: what `transformerfam.load` takes, or a TransformerFAM, which needs `tokenizer`.
        tokenizer: of a model that is given as such.
        adapter: folder or hub name of a PEFT adapter, or `shipped`, see `models.load`.
        reader: `model` as it is, or with its weights `bswa`, `sinks` or `full`; see
            `readers.readers_of`.
        dtype: of the weights, such as "bfloat16"; by default as they are stored.
        device: by default the CPU. The harness's own default is cuda:0, which is the CPU too where
            there is no CUDA, as with its other models.
        max_length: longest stream in tokens: longer contexts lose their beginning, and rolling texts
            are read in windows, as with other models of the harness. None: there is no limit, and
            nothing is ever cut, not even by a reader whose attention is full.
        max_gen_toks: longest continuation, where a task does not say.
        add_bos_token: whether texts get the tokenizer's special tokens; None: as it does by itself.
        prefix_token_id: what stands before a text without context; by default the token of the
            beginning, else of the end.
        batch_size: accepted and ignored: contexts are read one after the other.
        max_batch_size: as `batch_size`.
        geometry: any field of `FamConfig`; by default that of the model or adapter.

    Raises:
        UserError: a ValueError or not, of one sentence: no such model, reader, argument or geometry.
    """

    def __init__(
        self,
        pretrained: Any = EMBEDDED,
        *,
        tokenizer: Any = None,
        adapter: str | None = None,
        reader: str = "model",
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **geometry: Any,
    ) -> None:
        super().__init__()
        _check(geometry, max_length)
        if isinstance(pretrained, str):
            dtype = None if dtype == "auto" else dtype
            if str(device).startswith("cuda") and not torch.cuda.is_available():
                device = None
            model, tokenizer = load(pretrained, dtype=dtype, device=device, adapter=adapter)
            if add_bos_token is not None:
                tokenizer.add_bos_token = add_bos_token
        elif tokenizer is None:
            raise UserError("A model that is given as such needs its tokenizer beside it.")
        elif is_transformerfam(pretrained):
            model = pretrained
        else:
            raise UserError("This model is no TransformerFAM; convert it first.")
        self.model = _reader(model, reader, geometry)
        if isinstance(pretrained, str):
            _warn_of_untrained(model, self.model)
        self.tokenizer = tokenizer
        self.max_length, self.max_gen_toks = max_length, max_gen_toks
        self.add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._device = self.model.device

    # ---- text and tokens, as HFLM of the harness

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without context is predicted from."""
        chosen = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next(token for token in chosen if token is not None)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, without another beginning if the text has one written out."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        prefix = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is None and string.startswith(prefix):
            special = False
        return self._encode(string, special)

    def _encode(self, string: str, special: bool | None) -> list[int]:
        chosen = {} if special is None else {"add_special_tokens": special}
        # verbose=False: a text may be longer than the model's window; that is what we are for.
        ids: list[int] = self.tokenizer(string, verbose=False, **chosen)["input_ids"]
        return ids

    def _encode_prompt(self, context: str, room: int) -> list[int]:
        """What a continuation is generated from; `room` tokens of `max_length` are kept for it."""
        start = self.tokenizer.bos_token
        written = start is not None and context.startswith(start)
        ids = self._encode(context, False if written else self.add_bos_token)
        if self.max_length is not None:
            if room >= self.max_length:
                raise UserError(
                    f"max_length={self.max_length} leaves no room to read before {room} tokens are "
                    "generated; raise it, or lower max_gen_toks."
                )
            ids = ids[-(self.max_length - room) :]
        return ids or [self.prefix_token_id]

    @property
    def tokenizer_name(self) -> str:
        """Names the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; without its system message if the template takes none."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return render(chat_history)
        except TemplateError:
            return render([message for message in chat_history if message["role"] != "system"])

    # ---- requests

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log p in nats, is it the greedy continuation) of each (key, context, continuation)."""
        asked = [(key, self._fitted(context, ids), ids) for key, context, ids in requests]
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(asked), desc="Reading", disable=disable_tqdm) as bar:
            # Continuations of the same context come in a row: the choices of a question.
            for context, group in groupby(asked, key=lambda request: request[1]):
                same = list(group)
                memory = self._asked(context)
                for (key, _, _), each in zip(
                    same, score_each(self.model, [ids for *_, ids in same], memory), strict=True
                ):
                    found.append((-each.nats, bool(each.hits.all())))
                    self.cache_hook.add_partial("loglikelihood", key, found[-1])
                    bar.update()
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """log p in nats of whole texts: one stream each, or windows of `max_length`."""
        found = []
        for request in tqdm(requests, desc="Reading", disable=disable_tqdm):
            (text,) = request.args
            # A text is read, not asked: each token with what the windows and sinks show of the others.
            windows = self._windows(self.tok_encode(text))
            found.append(-sum(self._nats(context, ids) for context, ids in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text, an end token or the most tokens."""
        asked = []
        for request in requests:
            context, said = request.args
            options = dict(normalize_gen_kwargs(said, self.max_gen_toks))
            most = options.pop("max_gen_toks")
            stops = self._stop_texts(options.pop("until"))
            asked.append((self._encode_prompt(context, most), stops, most, _sampling(options)))
        found = []
        for request, (_, stops, most, sampling), memory in zip(
            tqdm(requests, desc="Generating", disable=disable_tqdm),
            asked,
            self._behind(prompt for prompt, *_ in asked),
            strict=True,
        ):
            found.append(self._continue(memory, stops, most, sampling))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_geometry": self.model.fam_config.to_dict(),
        }

    # ---- parts

    def _behind(self, contexts: Iterable[list[int]]) -> Iterator[Memory]:
        """A memory that has read each context; contexts that are equal in a row are read once."""
        for context, group in groupby(contexts):
            memory = self._asked(context)
            for left in reversed(range(len(list(group)))):
                yield memory.fork() if left else memory

    def _nats(self, context: list[int], ids: list[int]) -> float:
        """-log p of a part of a text behind another."""
        memory = absorb(self.model, self._fitted(context, ids))
        return sum(chunk.nats for chunk in read(self.model, ids, memory))

    def _asked(self, context: list[int]) -> Memory:
        """Nobody says where in a context its question begins: all of it is asked."""
        memory = Memory.for_model(self.model)
        with memory.asked():
            return absorb(self.model, context, memory)

    def _fitted(self, context: list[int], ids: list[int]) -> list[int]:
        """The context, cut at its beginning so that all but the last token fit into `max_length`."""
        if self.max_length is not None:
            if len(ids) > self.max_length:
                raise UserError(
                    f"A continuation of {len(ids)} tokens does not fit into "
                    f"max_length={self.max_length}; raise it, or leave it out."
                )
            context = context[-(self.max_length + 1 - len(ids)) :]
        return context or [self.prefix_token_id]

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """(context, continuation) of the parts of a text that are scored one by one."""
        if not ids:
            return []
        if self.max_length is None:
            return [([self.prefix_token_id], ids)]
        found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(window) for window in found]

    def _stop_texts(self, until: list[str]) -> list[str]:
        end = self.eot_token_id
        name = None if end is None else self.tokenizer.decode(end, skip_special_tokens=False)
        return [text for text in handle_stop_sequences(until, eos=name) if text]

    def _continue(self, memory: Memory, stops: list[str], most: int, sampling: Sampling) -> str:
        """The text after a memory, up to a stop text, which is left out."""
        reach = max((len(text.encode()) for text in stops), default=0) + _MORE_TOKENS
        ends = end_tokens(self.model, self.tokenizer)
        ids: list[int] = []
        for token in generate(
            self.model, [], memory, max_new_tokens=most, sampling=sampling, stop=ends
        ):
            ids.append(token)
            last = self.tokenizer.decode(ids[-reach:], skip_special_tokens=False)
            if any(text in last for text in stops):
                break
        said = self.tokenizer.decode(ids, skip_special_tokens=True)
        return str(cut_at_stops(said, stops, None))


def main() -> None:
    """`python -m transformerfam.harness ...` is `lm_eval ...` with `--model transformerfam` known."""
    from lm_eval.__main__ import cli_evaluate

    from _transformerfam_lm_eval import register

    register()
    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(str(error))


def _check(geometry: Mapping[str, Any], max_length: int | None) -> None:
    unknown = sorted(set(geometry) - _GEOMETRY)
    if unknown:
        raise UserError(
            f"transformerfam has no model argument {', '.join(unknown)}; it takes pretrained, "
            f"adapter, reader, dtype, device, max_length, max_gen_toks, add_bos_token, "
            f"prefix_token_id and the geometry ({', '.join(sorted(_GEOMETRY))})."
        )
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length must be at least 1, not {max_length}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "lm_eval --model transformerfam runs in one process; start it without more."
        )


def _reader(model: Any, name: str, geometry: dict[str, Any]) -> Any:
    """The model under the geometry that was asked for; `model` itself stays as it is."""
    config = changed(model.fam_config, geometry)
    if config != model.fam_config:
        model = twin(model, config)
    return readers_of(model, [name], full_limit=None)[0].model


def _warn_of_untrained(loaded: Any, reader: Any) -> None:
    config = reader.fam_config
    if config.has_feedback and not is_trained(loaded, config):
        _logger.warning(
            "The feedback memory of this model is untrained, which makes it read worse; "
            "fam_length=0 turns it off."
        )


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """How a request wants tokens chosen; repeatable by torch's seed, which the harness sets."""
    unknown = sorted(set(options) - _GENERATION)
    if unknown or options.get("num_beams", 1) != 1:
        raise UserError(
            f"transformerfam cannot generate with {', '.join(unknown or ['num_beams'])}; "
            "leave it out with --gen_kwargs."
        )
    if not options["do_sample"]:
        return Sampling()
    return Sampling(
        temperature=float(options.get("temperature", 1.0)),
        top_k=int(options.get("top_k") or 0),
        top_p=float(options.get("top_p") or 1.0),
        seed=int(torch.randint(1 << 62, ())),
    )


if __name__ == "__main__":
    main()
