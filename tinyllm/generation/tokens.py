"""From token ids to token ids: `generate`, and `iter_tokens`, which gives each token when it is drawn."""

from __future__ import annotations

import reprlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyllm._internal.checks import check_choice, check_int, check_ints
from tinyllm.generation.choice import make_decoder
from tinyllm.generation.cuda_graph import GraphedCache
from tinyllm.generation.decoder import Cached, Decoder
from tinyllm.generation.engine import Engine
from tinyllm.generation.lookup import Lookup
from tinyllm.generation.sampling import Sampling, draw
from tinyllm.model import SimpleLLM

_WRITERS = (Engine, GraphedCache)  # decoders that draw by themselves
_NO_TOKEN = -1  # of a row that has ended where there is no stop id to fill up with


def generate(
    model: SimpleLLM,
    ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | Sequence[int] | None = None,
    suppress_id: int | None = None,
    ids_below: int | None = None,
    return_logprobs: bool = False,
    overflow: str = "slide",
    prompt_lookup_num_tokens: int | None = None,
    cache_dtype: torch.dtype | None = None,
    decoder: Decoder | None = None,
) -> Any:
    """Continue `ids` by up to `max_new_tokens` tokens.

    Keys and values of what the model has read are kept, see `Cached`, so that a token takes one pass over the weights.
    A model that is not causal, as the article's is, has none to keep: it computes the whole context for each token.

    Ctrl-C ends the texts where they are: it raises no KeyboardInterrupt, and the tokens drawn so far are returned.

    Args:
        model: any SimpleLLM; it runs in eval mode and keeps the mode that it was in.
        ids: the prompt: integers of shape (T,), or (B, T) for B prompts of one length; or a list of B prompts of
            different lengths, or of 1-D tensors. T >= 1.
        max_new_tokens: at least 0.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`.
        seed: for the same draw every time: a row's text depends on its own seed alone, whatever else is in the batch.
            Row b gets seed + b, or of B seeds the one at b. None draws from torch's global generator.
        generator: instead of `seed`, a generator of the caller's, from which the rows draw in turn; for several tokens
            at once where these are guessed.
        stop_id: stop after this token, or any of these, such as the tokenizer's `end_of_text_id`.
        suppress_id: never draw this token, such as the tokenizer's `unknown_id`, which stands for no text.
        ids_below: see `Sampling`.
        return_logprobs: also return the log-probabilities of the new tokens.
        overflow: what to do at the model's max_seq_len, for positions cannot slide along with the text. "slide": the
            last half of the context is read again, and writing goes on (a model without a cache takes the last
            max_seq_len tokens each time); of a longer prompt the last max_seq_len tokens are read. "stop": prompt and
            text together have at most max_seq_len tokens.
        prompt_lookup_num_tokens: of a single prompt; where the text's last two or three tokens have come before, guess
            up to this many tokens, those that followed there (Saxena, 2023, "Prompt Lookup Decoding"). One pass over
            the weights computes all guesses, and those are kept that are drawn anyway: the text is the same, within
            rounding, and one that repeats itself, such as code, is written faster. Default: none.
        cache_dtype: of the keys and values that are kept; default: the decoder's, see `Cached` and `Engine`.
        decoder: one that `make_decoder` made of this model, to be kept from call to call while the weights stay: the
            beginning of a prompt that it has read before is not computed again. One text after the other may use it: a
            stream that goes on after another use of its decoder raises RuntimeError.

    Returns:
        int64, the prompt with its continuation, on the model's device: (T + new,) or (B, T + new). A row that has
        stopped is filled up with the (first) stop id until the last one has. Of a list of different lengths, or of
        tensors, a list of 1-D tensors without such filling. With return_logprobs the pair of that and the
        log-probabilities of the new tokens alone: float32 (new,), (B, new), 0 where filled up, or a list. They are
        the model's own, in nats, whatever temperature and the like made of them.

    Raises:
        TypeError: `ids` are not integers, or an argument is not of its type.
        ValueError: an argument is out of range, both `seed` and `generator` are given, or a prompt is longer than
            max_seq_len and overflow "stop".
    """
    arguments = locals()  # those of iter_tokens, by the same names
    stream = iter_tokens(**{**arguments, "return_logprobs": True})
    steps = []
    with suppress(KeyboardInterrupt):
        for step in stream:
            steps.append(step)  # one by one, so that what is there stays
    rows = len(stream.prompts)
    device = stream.prompts[0].device
    new = torch.stack([tokens for tokens, _ in steps], -1) if steps else torch.empty(0, dtype=torch.int64)
    logprobs = torch.stack([logprobs for _, logprobs in steps], -1) if steps else torch.empty(0)
    new, logprobs = new.to(device).reshape(rows, -1), logprobs.to(device).reshape(rows, -1)
    if stream.layout == "list":
        lengths = stream.num_tokens
        texts = [torch.cat([prompt, own[:n]]) for prompt, own, n in zip(stream.prompts, new, lengths, strict=True)]
        return (texts, [own[:n] for own, n in zip(logprobs, lengths, strict=True)]) if return_logprobs else texts
    out = torch.cat([torch.stack(stream.prompts), new], dim=-1)
    if stream.layout == "one":
        out, logprobs = out[0], logprobs[0]
    return (out, logprobs) if return_logprobs else out


def iter_tokens(
    model: SimpleLLM,
    ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    stop_id: int | Sequence[int] | None = None,
    suppress_id: int | None = None,
    ids_below: int | None = None,
    return_logprobs: bool = False,
    overflow: str = "slide",
    prompt_lookup_num_tokens: int | None = None,
    cache_dtype: torch.dtype | None = None,
    decoder: Decoder | None = None,
) -> TokenStream:
    """Like `generate`, but yields each new token when it is drawn: int64 of shape () or (B,).

    A row that has ended yields the (first) stop id, or -1 where there is none. With return_logprobs each token comes
    in a pair with its log-probability, float32 of the same shape. Arguments are checked at the call, not at the first
    token. Ctrl-C raises KeyboardInterrupt, and ends the stream.
    """
    vocab_size, max_seq_len = model.config.vocab_size, model.config.max_seq_len
    prompts, layout = _prompts(model, ids)
    if cache_dtype is not None and not isinstance(cache_dtype, torch.dtype):
        raise TypeError(f"cache_dtype is {cache_dtype!r}; it must be a torch.dtype")
    max_new_tokens = check_int("max_new_tokens", max_new_tokens, 0)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, suppress_id, ids_below)
    sampling.check_vocabulary(vocab_size)
    check_choice("overflow", overflow, ("slide", "stop"))
    generators = _generators(seed, generator, len(prompts))
    stops = [] if stop_id is None else check_ints("stop_id", stop_id)
    stop_ids = stops if isinstance(stops, list) else [stops]
    for index in stop_ids:
        if not 0 <= index < vocab_size:
            raise ValueError(f"stop_id is {index}; the model's ids are 0 .. {vocab_size - 1}")
    room = [max_new_tokens] * len(prompts)
    if overflow == "stop":
        longest = max(map(len, prompts))
        if longest > max_seq_len:
            raise ValueError(
                f"ids has {longest} tokens; with overflow='stop' a prompt may have max_seq_len, {max_seq_len}"
            )
        room = [min(max_new_tokens, max_seq_len - len(prompt)) for prompt in prompts]
    # The last token is drawn, and not read.
    needed = max(len(prompt) + own - 1 for prompt, own in zip(prompts, room, strict=True))
    needed = min(max(needed, max(map(len, prompts))), max_seq_len)
    if decoder is None:
        decoder = make_decoder(model, len(prompts), needed, cache_dtype=cache_dtype)
    elif not isinstance(getattr(decoder, "model", None), nn.Module):
        raise TypeError(f"decoder is {decoder!r}; it must be one that make_decoder has made of the model")
    elif decoder.model is not model:
        raise ValueError(
            f"decoder is a {type(decoder).__name__} of another model; it must be one that was made of this very model"
        )
    elif decoder.batch_size != len(prompts):
        raise ValueError(f"decoder has {decoder.batch_size} rows; the number of prompts is {len(prompts)}")
    elif decoder.capacity is not None and decoder.capacity < needed:
        raise ValueError(f"decoder holds {decoder.capacity} tokens a row; prompt and text may have {needed}")
    lookup = None if prompt_lookup_num_tokens is None else _lookup(prompt_lookup_num_tokens, prompts, decoder)
    return TokenStream(model, decoder, prompts, layout, room, sampling, generators, stop_ids, return_logprobs, lookup)


class TokenStream(Iterator[Any]):
    """The new tokens of a batch, which are drawn while they are asked for; made by `iter_tokens`.

    Attributes:
        prompts: int64 (T,) of each row, as given.
        num_tokens: how many tokens each row has drawn so far, a stop id included.
        finish_reasons: of each row "stop", after a stop id; "length", for want of further tokens or of room;
            "interrupt" or "error", after an exception; what `end` said; None while it is being written.
        prefill_seconds: wall time until the first token was drawn, the prompts being read.
        decode_seconds: wall time for all tokens after the first. The caller's own time between them is in neither.
        layout: "one" (T,), "batch" (B, T) or "list", as the prompts came.
    """

    def __init__(
        self,
        model: SimpleLLM,
        decoder: Decoder,
        prompts: list[Tensor],
        layout: str,
        room: list[int],
        sampling: Sampling,
        generators: list[torch.Generator] | torch.Generator,
        stop_ids: list[int],
        with_logprobs: bool,
        lookup: Lookup | None = None,
    ) -> None:
        self.prompts = prompts
        self.layout = layout
        self.num_tokens = [0] * len(prompts)
        self.finish_reasons: list[str | None] = [None if own > 0 else "length" for own in room]
        self.prefill_seconds = self.decode_seconds = 0.0
        self._decoder, self._room, self._sampling, self._generators = decoder, room, sampling, generators
        self._stop_ids, self._with_logprobs, self._lookup = stop_ids, with_logprobs, lookup
        self._contexts = [prompt[-model.config.max_seq_len :].tolist() for prompt in prompts]
        self._seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=prompts[0].device)
            for seen, prompt in zip(self._seen, prompts, strict=True):
                seen[prompt] = True
        self._mark = object()  # by which the decoder knows its stream, without holding it
        self._lengths: list[int] = []  # of the decoder's rows, as this stream has left them
        self._ahead: deque[tuple[Tensor, Tensor]] = deque()  # drawn, and not asked for yet
        self._last: Tensor | None = None  # the tokens drawn last, which the decoder has not read

    def end(self, row: int, reason: str) -> None:
        """Have a row end before its time; `reason` is why."""
        self.finish_reasons[row] = reason

    def __next__(self) -> Any:
        if None not in self.finish_reasons:
            raise StopIteration
        begin, is_first = time.perf_counter(), self._last is None
        try:
            with torch.inference_mode():
                tokens, logprobs = self._step()
        except BaseException as error:  # as a generator: what has failed is over
            why = "interrupt" if isinstance(error, KeyboardInterrupt) else "error"
            self.finish_reasons = [reason or why for reason in self.finish_reasons]
            raise
        seconds = time.perf_counter() - begin
        if is_first:
            self.prefill_seconds += seconds
        else:
            self.decode_seconds += seconds
        if self.layout == "one":
            tokens, logprobs = tokens[0], logprobs[0]
        return (tokens, logprobs) if self._with_logprobs else tokens

    def _step(self) -> tuple[Tensor, Tensor]:
        """Draw the next tokens and their log-probabilities, both (B,), and note which rows they end."""
        mine = self._decoder.used_by is self._mark and self._decoder.lengths() == self._lengths
        if self._last is not None and not mine:
            raise RuntimeError(
                "decoder has been used elsewhere since this stream's last token; write one text after the other, or "
                "make a decoder for each"
            )
        if not self._ahead:
            self._ahead.extend(self._draw())
            self._decoder.used_by, self._lengths = self._mark, self._decoder.lengths()
            if self._lookup is not None:
                for tokens, _ in self._ahead:
                    self._lookup.add(int(tokens))
        tokens, logprobs = (x.cpu() for x in self._ahead.popleft())  # where the host looks at them anyway
        self._last = tokens
        ended = [reason is not None for reason in self.finish_reasons]
        for row, token in enumerate(tokens.tolist()):
            if ended[row]:
                continue
            self.num_tokens[row] += 1
            if token in self._stop_ids:
                self.finish_reasons[row] = "stop"
            elif self.num_tokens[row] == self._room[row]:
                self.finish_reasons[row] = "length"
        if any(ended):
            mask = torch.tensor(ended, device=tokens.device)
            tokens = tokens.masked_fill(mask, self._stop_ids[0] if self._stop_ids else _NO_TOKEN)
            logprobs = logprobs.masked_fill(mask, 0.0)
        return tokens, logprobs

    def _draw(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Draw the next tokens, and those after them that the decoder draws in the same call."""
        if self._last is None:
            logits = self._decoder.read([torch.tensor(context) for context in self._contexts])
        else:
            self._make_room(self._last)
            if guessed := self._guess():
                return self._verify(self._last, guessed)
            count = self._tokens_ahead()
            if isinstance(self._decoder, _WRITERS) and count > 0:
                uniforms = self._uniforms(count)
                if uniforms is None:
                    uniforms = torch.zeros(len(self.prompts), count, dtype=torch.float64)
                written = self._decoder.write(self._last, uniforms, self._sampling, self._seen, self._stop_ids)
                self._note(written.tokens[:, :-1])
                return zip(written.tokens.unbind(-1), written.logprobs.unbind(-1), strict=True)
            logits = self._decoder.step(self._last)
        uniforms = self._uniforms(1)
        tokens, logprobs = draw(logits, self._sampling, uniforms if uniforms is None else uniforms[:, 0], self._seen)
        if self._seen is not None:
            self._seen.scatter_(-1, tokens.unsqueeze(-1), True)
        return [(tokens, logprobs)]

    def _guess(self) -> list[int]:
        """Return guesses at what follows the last token: none that are not wanted, nor beyond the decoder's room."""
        return [] if self._lookup is None else self._lookup.guess()[: self._tokens_left() - 1]

    def _verify(self, last: Tensor, guessed: list[int]) -> Iterable[tuple[Tensor, Tensor]]:
        """Draw what follows the last token, and what follows each guess, up to the first that is wrong."""
        count = len(guessed) + 1
        seen = self._seen
        if seen is not None:
            seen = seen.repeat(count, 1)
            for i, token in enumerate(guessed):
                seen[i + 1 :, token] = True
        tokens = torch.cat([last, torch.tensor(guessed)])
        uniforms = torch.zeros(count, dtype=torch.float64)
        if self._sampling.temperature > 0:
            # Those that are not needed are the numbers of the next tokens. One by one, as without guesses: a GPU's
            # generator gives others for several at once.
            generator = self._generators if isinstance(self._generators, torch.Generator) else self._generators[0]
            state = generator.get_state()
            uniforms = torch.cat([cast(Tensor, self._uniforms(1))[0] for _ in range(count)])
            generator.set_state(state)
        drawn, logprobs = cast("Cached | Engine", self._decoder).verify(tokens, uniforms, self._sampling, seen)
        stop = next((i + 1 for i, token in enumerate(drawn.tolist()) if token in self._stop_ids), len(drawn))
        drawn, logprobs = drawn[:stop], logprobs[:stop]
        for _ in range(len(drawn)):
            self._uniforms(1)
        if self._seen is not None:
            self._seen[:, drawn] = True
        self._note(drawn[None, :-1])
        cast(Lookup, self._lookup).learn(len(guessed), len(drawn) - 1)
        return zip(drawn.unsqueeze(-1), logprobs.unsqueeze(-1), strict=True)

    def _tokens_ahead(self) -> int:
        """Return how many tokens a decoder may draw in a call: none that are not wanted, nor beyond its room."""
        if not isinstance(self._decoder, _WRITERS):
            return 0
        # A generator of the caller's has given as many numbers as there are tokens, whenever it is looked at; and what
        # comes after each token may be guessed.
        drawn_from = isinstance(self._generators, torch.Generator) and self._sampling.temperature > 0
        one_by_one = drawn_from or self._lookup is not None
        return min(1 if one_by_one else self._decoder.tokens_a_call, self._tokens_left())

    def _tokens_left(self) -> int:
        """Return how many more tokens the longest row may get, and the decoder takes."""
        left = [
            room - drawn
            for room, drawn, reason in zip(self._room, self.num_tokens, self.finish_reasons, strict=True)
            if reason is None
        ]
        return min(max(left), cast(int, self._decoder.capacity) - max(self._decoder.lengths()))

    def _note(self, tokens: Tensor) -> None:
        """Add tokens (B, n) to the contexts."""
        if self._decoder.capacity is not None:
            for context, own in zip(self._contexts, tokens.tolist(), strict=True):
                context += own

    def _make_room(self, tokens: Tensor) -> None:
        """Have full rows forget half of what they hold, and note the tokens (B,) that come next."""
        capacity = self._decoder.capacity
        lengths = [] if capacity is None else self._decoder.lengths()
        full = [row for row, length in enumerate(lengths) if length == capacity]
        if full and capacity is not None:
            # With the new token it is half the capacity. A row that has ended only goes along with the others.
            half = max(capacity // 2 - 1, 1)
            kept = [half if self.finish_reasons[row] is None else 1 for row in full]
            windows = [torch.tensor(self._contexts[row][-n:]) for row, n in zip(full, kept, strict=True)]
            self._decoder.read(windows, full)
        self._note(tokens.unsqueeze(-1))

    def _uniforms(self, count: int) -> Tensor | None:
        """Return numbers in [0, 1) for each row, float64 (B, count); None at temperature 0, which needs none."""
        if self._sampling.temperature == 0:
            return None
        if isinstance(self._generators, torch.Generator):
            generator = self._generators
            size = len(self.prompts), count
            return torch.rand(size, dtype=torch.float64, device=generator.device, generator=generator)
        return torch.stack([torch.rand(count, dtype=torch.float64, generator=own) for own in self._generators])


def _prompts(model: SimpleLLM, ids: Any) -> tuple[list[Tensor], str]:
    """Return prompts, each int64 (T,) on the model's device, checked, and their layout, see `TokenStream`."""
    device = next(model.parameters()).device
    vocab_size = model.config.vocab_size
    if _are_prompts(ids):
        prompts, layout = [_tensor(f"ids[{index}]", prompt) for index, prompt in enumerate(ids)], "list"
        for index, prompt in enumerate(prompts):
            if prompt.dim() != 1 or len(prompt) == 0:
                shape = tuple(prompt.shape)
                raise ValueError(f"ids[{index}] has shape {shape}; each prompt must be (T,), with at least one token")
            _check_ids(f"ids[{index}]", prompt, vocab_size)
        return [prompt.to(device, torch.int64) for prompt in prompts], layout
    whole = _tensor("ids", ids)
    if whole.numel() == 0 or whole.dim() not in (1, 2):
        raise ValueError(f"ids has shape {tuple(whole.shape)}; it must be (T,) or (B, T), with at least one token")
    _check_ids("ids", whole, vocab_size)
    layout = "one" if whole.dim() == 1 else "batch"
    return [*whole.to(device, torch.int64).reshape(-1, whole.size(-1))], layout


def _lookup(most: int, prompts: list[Tensor], decoder: Decoder) -> Lookup:
    check_int("prompt_lookup_num_tokens", most, 1)
    if len(prompts) > 1:
        raise ValueError(f"prompt_lookup_num_tokens is {most} for {len(prompts)} prompts; it is for a single one")
    if not isinstance(decoder, (Cached, Engine)):
        raise ValueError(
            f"prompt_lookup_num_tokens is {most} with a {type(decoder).__name__}; guesses need a decoder that keeps "
            "what it has read, which models have that are causal and made of tinyllm's own modules"
        )
    return Lookup(prompts[0].tolist(), most)


def _are_prompts(ids: Any) -> bool:
    """Return whether `ids` are prompts that no tensor stands for: of different lengths, or tensors themselves."""
    if not isinstance(ids, Sequence):
        return False
    if any(isinstance(prompt, Tensor) and prompt.dim() > 0 for prompt in ids):
        return True
    several = all(isinstance(prompt, Sized) and not isinstance(prompt, Tensor) for prompt in ids)
    return several and len({*map(len, ids)}) > 1


def _tensor(name: str, ids: Any) -> Tensor:
    try:
        return torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):  # whatever it is that torch stumbles over
        raise TypeError(
            f"{name} is {reprlib.repr(ids)}; it must be token ids, which are integers (generate_text takes text)"
        ) from None


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {ids.dtype}; token ids are integers")
    low, high = (int(end) for end in ids.to(torch.int64).aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} has the token id {low if low < 0 else high}; the model's ids are 0 .. {vocab_size - 1}"
        )


def _generators(
    seed: int | Sequence[int] | None, generator: torch.Generator | None, rows: int
) -> list[torch.Generator] | torch.Generator:
    """Return a generator for each row, or one for all."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}; it must be a torch.Generator")
    if seed is None:
        return torch.default_generator if generator is None else generator
    if generator is not None:
        raise ValueError("pass seed or generator, not both")
    given = check_ints("seed", seed)
    seeds = given if isinstance(given, list) else [given + row for row in range(rows)]
    if len(seeds) != rows:
        raise ValueError(f"seed has {len(seeds)} seeds; the number of prompts is {rows}")
    for number in seeds:
        if not 0 <= number < 2**63:
            raise ValueError(f"seed is {number}; it must be at least 0 and below 2**63")
    return [torch.Generator().manual_seed(number) for number in seeds]
