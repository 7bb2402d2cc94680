"""Write with one provider, in a process of its own, so that memory and threads are nobody else's:

    python -m benchmarks.writers PROVIDER FOLDER

FOLDER holds a GPT-2 as Hugging Face saves it; OMP_NUM_THREADS is the number of threads. The process loads the model and
says so in a line of JSON on its standard output. Each further line answers a line of standard input, which holds
prompts of one length and the number of tokens to write; `benchmarks.generation` asks. Nothing here imports torch before
the provider does.

    {"prompts": [[5, 7, 1]], "new_tokens": 2}  ->  {"tokens": [[3, 3]], "first_s": 0.1, "token_s": 0.02, ...}
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinyllm.model import SimpleLLM

TRANSFORMERS, COMPILED, CTRANSLATE2, LLAMA = "transformers", "transformers, compiled", "CTranslate2", "llama.cpp"
FLOAT32, BF16, INT8, INT4 = "float32", "bf16", "int8", "int4"
OURS = "tinyllm"  # as in .row, which imports torch
READ = "read bandwidth"  # the process that measures what memory gives, and does not write

Prompts = Sequence[Sequence[int]]
# Continue prompts of one length greedily by so many tokens; call the function after each step of the batch.
Write = Callable[[Prompts, int, Callable[[], None]], list[list[int]]]
Load = Callable[[], Write]


def threads() -> int:
    return int(os.environ["OMP_NUM_THREADS"])


# ---- Providers


@dataclass(frozen=True)
class Provider:
    """One side of the comparison.

    Attributes:
        name: the engine.
        weights: FLOAT32, BF16, INT8 or INT4: how the matrices are kept.
        package: what must be installed, as pip calls it.
        module: what is imported of it.
        open: imports all that it needs, and returns the function that loads the model of a folder; what that takes is
            the time to load.
        convert: writes the model of a folder in the engine's own form, before anything is timed.
        cache_bytes: size of an element of the cache of keys and values.
        most_sequences: so many at a time.
    """

    name: str
    weights: str
    package: str
    module: str
    open: Callable[[Path, str], Load]
    convert: Callable[[Path, str], None] | None = None
    cache_bytes: int = 4
    most_sequences: float = math.inf

    @property
    def label(self) -> str:
        return f"{self.name}, {self.weights}"


def convert_tinyllm(folder: Path, weights: str) -> None:
    if weights == FLOAT32:
        return
    from tinyllm.quantization import quantize
    from tinyllm.runs.load import load_run, save_quantized

    run = load_run(folder)
    save_quantized(quantize(run.model, weights), run.tokenizer, folder / f"tinyllm-{weights}")


def load_tinyllm(folder: Path, weights: str) -> SimpleLLM:
    from tinyllm.model import SimpleLLM
    from tinyllm.runs.load import load_model

    return SimpleLLM.from_pretrained(folder) if weights == FLOAT32 else load_model(folder / f"tinyllm-{weights}")


def open_tinyllm(folder: Path, weights: str) -> Load:
    import torch

    from tinyllm.generation import iter_tokens

    def load() -> Write:
        model = load_tinyllm(folder, weights)

        def write(prompts: Prompts, new_tokens: int, on_step: Callable[[], None]) -> list[list[int]]:
            steps = []
            for token in iter_tokens(model, torch.tensor(prompts), new_tokens, temperature=0.0):
                on_step()
                steps.append(token)
            return torch.stack(steps, dim=1).tolist()

        return write

    return load


def open_transformers(folder: Path, weights: str, compiled: bool = False) -> Load:
    import torch
    from transformers import CompileConfig, GPT2LMHeadModel
    from transformers.generation.streamers import BaseStreamer

    class Steps(BaseStreamer):
        """Streamer that is given the prompt first, then the tokens of each step."""

        def __init__(self, on_step: Callable[[], None]) -> None:
            self._on_step, self._prompt_is_next = on_step, True

        def put(self, value: torch.Tensor) -> None:
            if not self._prompt_is_next:
                self._on_step()
            self._prompt_is_next = False

        def end(self) -> None:
            pass

    arguments: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        # By itself `generate` compiles on GPUs only.
        config: Any = CompileConfig()
        config._compile_all_devices = True
        arguments |= {"cache_implementation": "static", "compile_config": config}

    def load() -> Write:
        dtype = torch.bfloat16 if weights == BF16 else torch.float32
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
        model.generation_config.eos_token_id = None

        def write(prompts: Prompts, new_tokens: int, on_step: Callable[[], None]) -> list[list[int]]:
            ids = torch.tensor(prompts)
            mask = torch.ones_like(ids)
            steps = Steps(on_step)
            found = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, streamer=steps, **arguments)
            tokens: list[list[int]] = found[:, ids.size(1) :].tolist()
            return tokens

        return write

    return load


def open_compiled(folder: Path, weights: str) -> Load:
    return open_transformers(folder, weights, compiled=True)


def convert_ctranslate2(folder: Path, weights: str) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(folder / f"ctranslate2-{weights}"), quantization=weights)


def open_ctranslate2(folder: Path, weights: str) -> Load:
    import ctranslate2

    def load() -> Write:
        path = folder / f"ctranslate2-{weights}"
        generator = ctranslate2.Generator(str(path), device="cpu", compute_type=weights, intra_threads=threads())
        names = json.loads((path / "vocabulary.json").read_text(encoding="utf-8"))

        def write(prompts: Prompts, new_tokens: int, on_step: Callable[[], None]) -> list[list[int]]:
            given = 0

            def on_token(_: Any) -> bool:
                nonlocal given
                given += 1
                if given % len(prompts) == 0:
                    on_step()
                return False

            found = generator.generate_batch(
                [[names[index] for index in prompt] for prompt in prompts],
                max_length=new_tokens,
                min_length=new_tokens,  # which switches the end of the text off
                sampling_topk=1,
                include_prompt_in_result=False,
                callback=on_token,
            )
            return [each.sequences_ids[0] for each in found]

        return write

    return load


def gguf_path(folder: Path, weights: str) -> Path:
    return folder / f"llama-{weights}.gguf"


def convert_llama(folder: Path, weights: str) -> None:
    from tinyllm import load_run
    from tinyllm.integrations.export import export

    model, tokenizer, _ = load_run(folder)
    export(model, tokenizer, gguf_path(folder, weights), to="gguf", weights=weights)


def open_llama(folder: Path, weights: str) -> Load:
    import llama_cpp
    import numpy as np

    def load() -> Write:
        path, count = str(gguf_path(folder, weights)), threads()
        engine = llama_cpp.Llama(path, n_ctx=0, n_batch=1024, n_threads=count, n_threads_batch=count, verbose=False)

        def write(prompts: Prompts, new_tokens: int, on_step: Callable[[], None]) -> list[list[int]]:
            engine.reset()
            tokens: list[int] = []
            following = list(prompts[0])
            for _ in range(new_tokens):
                engine.eval(following)
                logits = llama_cpp.llama_get_logits_ith(engine.ctx, -1)
                following = [int(np.ctypeslib.as_array(logits, (engine.n_vocab(),)).argmax())]
                tokens += following
                on_step()
            return [tokens]

        return write

    return load


_OURS = ("tinyllm", "tinyllm", open_tinyllm, convert_tinyllm)
_TRANSFORMERS = ("transformers", "transformers")
_CTRANSLATE2 = ("ctranslate2", "ctranslate2", open_ctranslate2, convert_ctranslate2)
_LLAMA = ("llama-cpp-python gguf", "llama_cpp", open_llama, convert_llama)
PROVIDERS = {
    provider.label: provider
    for provider in (
        # First: its tokens are what the others' are compared with.
        Provider(TRANSFORMERS, FLOAT32, *_TRANSFORMERS, open_transformers),
        Provider(OURS, FLOAT32, *_OURS),
        *(Provider(OURS, weights, *_OURS, cache_bytes=2) for weights in (BF16, INT8, INT4)),
        Provider(TRANSFORMERS, BF16, *_TRANSFORMERS, open_transformers, cache_bytes=2),
        Provider(COMPILED, FLOAT32, *_TRANSFORMERS, open_compiled),
        Provider(CTRANSLATE2, FLOAT32, *_CTRANSLATE2),
        Provider(CTRANSLATE2, INT8, *_CTRANSLATE2),
        *(Provider(LLAMA, w, *_LLAMA, cache_bytes=2, most_sequences=1) for w in (FLOAT32, INT8, INT4)),
    )
}
REFERENCE = next(iter(PROVIDERS))


# ---- What is measured


def read_bandwidth() -> float:
    """Return the bytes a second that reading gives, the best of several ways to add up an array of 256 MiB more than
    the last-level cache.

    A compiled loop, plain or with prefetch, of one row or four at a time, is no faster than the best of these on the
    processors tried: MKL's products read several streams and prefetch themselves.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import torch

    from .machine import best_time, last_level_cache_mib

    count, width = threads(), 49_152
    rows = (256 + round(last_level_cache_mib() or 0)) * 2**18 // (width * count) * count
    array = torch.ones(rows, width)
    ones, halves, parts = torch.ones(width), array.view(2, -1) if rows % 2 == 0 else array[:-1], array.chunk(count)
    with ThreadPoolExecutor(count) as pool:
        ways: list[Callable[[], object]] = [
            lambda: array.sum(),
            lambda: torch.dot(halves[0], halves[1]),
            lambda: list(pool.map(lambda part: torch.mv(part, ones), parts)),
            lambda: np.dot(halves[0].numpy(), halves[1].numpy()),
        ]
        return max(array.nbytes / best_time(way, 0.25) for way in ways)


def resident_bytes(field: str) -> int | None:
    """Return a line of Linux's /proc/self/status: VmRSS, what is in memory now, or VmHWM, the most since the start or
    `forget_peak`; None elsewhere."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), None)


def forget_peak() -> None:
    """Let VmHWM begin anew, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


class Server:
    """One provider: what it answers to each request."""

    def __init__(self, label: str, folder: Path) -> None:
        self._label, self._folder = label, folder
        self._write: Write | None = None
        self._before = 0  # bytes that the libraries hold

    def begin(self) -> dict[str, Any]:
        """Load the model; return what that took."""
        if self._label == READ:
            return {}
        provider = PROVIDERS[self._label]
        load = provider.open(self._folder, provider.weights)
        self._before = resident_bytes("VmRSS") or 0
        start = time.perf_counter()
        self._write = load()
        return {"load_s": time.perf_counter() - start}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the bandwidth; or the tokens, the seconds until the first ones and of each step that follows, and the
        most memory held beside the libraries'."""
        if self._write is None:
            return {"bytes_per_s": read_bandwidth()}
        stamps: list[float] = []
        new_tokens = request["new_tokens"]
        forget_peak()
        start = time.perf_counter()
        tokens = self._write(request["prompts"], new_tokens, lambda: stamps.append(time.perf_counter()))
        assert len(stamps) == new_tokens, f"{len(stamps)} steps for {new_tokens} tokens"
        peak = resident_bytes("VmHWM")
        return {
            "tokens": tokens,
            "first_s": stamps[0] - start,
            "token_s": (stamps[-1] - stamps[0]) / (new_tokens - 1),
            "peak_bytes": None if peak is None else peak - self._before,
        }


def main(label: str, folder: str) -> None:
    """Answer requests until there are no more."""
    server = Server(label, Path(folder))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # libraries that print do not disturb the answers

        def reply(answer: Callable[[], dict[str, Any]]) -> None:
            try:
                found = answer()
            except Exception as error:  # whatever a library may raise
                found = {"failed": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=replies, flush=True)

        reply(server.begin)
        for line in sys.stdin:
            reply(partial(server.answer, json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
