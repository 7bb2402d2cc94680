"""Where a training runs: Lightning Fabric with our settings, and the module that its strategies wrap.

Fabric starts the processes, places the model, shards or replicates it, and sums the gradients. The loop stays ours, in
`tinyllm.training.loop`.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tinyllm._internal.interrupt import holding_ctrl_c
from tinyllm._internal.words import count
from tinyllm.config.training import TrainConfig
from tinyllm.model import SimpleLLM, choose_device, init_gpt2_weights

_T = TypeVar("_T")

# How long processes wait for each other: the first one may be tokenizing text meanwhile.
_TIMEOUT = timedelta(hours=2)


class TrainingModule(nn.Module):
    """A model with its loss as `forward`, because strategies and precisions act on `forward` alone.

    Args:
        model: the model.
        label_smoothing: see `SimpleLLM.loss`; in training only.
        end_of_text_id: attention stops where this token begins a new document; None: it does not.
    """

    def __init__(self, model: SimpleLLM, *, label_smoothing: float = 0.0, end_of_text_id: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._label_smoothing = label_smoothing
        self._end_of_text_id = end_of_text_id

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """The loss, see `SimpleLLM.loss`; without targets the logits. ids, targets: int64 (B, T)."""
        if targets is None:
            logits: Tensor = self.model(ids)
            return logits
        smoothing = self._label_smoothing if self.training else 0.0
        if self._end_of_text_id is None and smoothing == 0:
            return self.model.loss(ids, targets)
        documents = None
        if self._end_of_text_id is not None:
            # The token belongs to the text after it, whose first token is predicted from it.
            documents = (ids == self._end_of_text_id).cumsum(1)
        return self.model.loss(ids, targets, label_smoothing=smoothing, documents=documents)


def launch(config: TrainConfig, say: Callable[[str], None] = lambda line: None) -> Fabric:
    """Start the processes that `config` asks for; each goes on from here.

    The command is run again for each further device of this machine, unless a launcher such as torchrun or SLURM has
    started the processes already. With several nodes, `say` is told whom this one waits for.

    Raises:
        ValueError: there are fewer devices than asked for, or the strategy cannot run here.
    """
    device = choose_device(config.device)
    _check_devices(config, device)
    devices: int | list[int] = config.devices
    if device.type == "cuda" and device.index is not None:
        if config.devices > 1:
            raise ValueError(f"devices is {config.devices}, but device names one, {str(device)!r}; say 'cuda'")
        devices = [device.index]
    # FSDP casts its shards itself, see _shard.
    precision = "32-true" if config.strategy == "fsdp" and config.precision == "bf16-mixed" else config.precision
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # we say ourselves what runs where
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fabric's advice, for others than those who run `tinyllm train`
        fabric = Fabric(
            accelerator=device.type,
            devices=devices,
            num_nodes=config.num_nodes,
            strategy=_strategy(config, device),
            precision=cast(Any, precision),
        )
        if config.num_nodes > 1:
            _meet(fabric, config, say)
        _Launched.listen()
        _leave_ctrl_c_to_the_first(fabric)
        with ending_others(fabric):
            fabric.launch()
    return fabric


def _meet(fabric: Fabric, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Say where the nodes of a training meet, which they have to be told if no launcher has started them."""
    by_hand = isinstance(getattr(fabric.strategy, "cluster_environment", None), LightningEnvironment)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if by_hand and missing:
        raise ValueError(
            f"num_nodes is {config.num_nodes}, but the environment has no {', '.join(missing)}: give each node the "
            "address and a free port of the first one, and its own NODE_RANK, 0, 1, ...; or start all with torchrun"
        )
    if "MASTER_ADDR" in os.environ:
        others = count(config.num_nodes - 1, "other node")
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '?')}"
        say(f"Node {os.environ.get('NODE_RANK', '?')} of {config.num_nodes}: waiting for {others} at {where}")


def _leave_ctrl_c_to_the_first(fabric: Fabric) -> None:
    """Have the processes that are started block SIGINT from their first moment, which a terminal sends to all."""
    launcher: Any = fabric.strategy.launcher
    if (start := getattr(launcher, "_call_children_scripts", None)) is not None:
        launcher._call_children_scripts = holding_ctrl_c()(start)


@contextmanager
def ending_others(fabric: Fabric) -> Iterator[None]:
    """End the processes that this one has started if Ctrl-C ends it: they would tell at length that it has gone."""
    try:
        yield
    except KeyboardInterrupt:
        started = getattr(fabric.strategy.launcher, "procs", [])
        others = list(started)
        started.clear()  # Lightning watches the list, and would kill this process when one of the others ends
        for process in others:
            process.kill()
        raise


class _Launched(logging.Handler):
    """Say in a line what Lightning is about to do when a process has ended: it kills the others, this one included."""

    @classmethod
    def listen(cls) -> None:
        logger = logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script")
        if not any(isinstance(handler, cls) for handler in logger.handlers):
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.addHandler(cls())

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"PID (\d+) terminated with code (-?\d+)", record.getMessage()):
            status = int(found[2])
            how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
            sys.stderr.write(f"\ntinyllm: error: process {found[1]} of this training has ended ({how}): all do\n")


def setup(
    fabric: Fabric,
    module: TrainingModule,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    seed: int = 0,
    compiled: bool = False,
) -> tuple[nn.Module, Any]:
    """The module and its optimizer as the strategy wraps them; `module` itself is moved, and sharded, in place.

    A model on the meta device, which only "fsdp" takes, gets its weights when each process has its part of it: those
    that `init_gpt2_weights` draws from a generator of this seed.
    """
    on_meta = next(module.parameters()).is_meta
    wrapped: Any = torch.compile(module) if compiled else module
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        wrapped, optimizer = fabric.setup(wrapped, make_optimizer(module))
        return wrapped, optimizer
    wrapped = fabric.setup_module(wrapped)
    if on_meta:
        init_gpt2_weights(module.model, generator=torch.Generator().manual_seed(seed))
    return wrapped, fabric.setup_optimizers(make_optimizer(module))  # of the weights as they lie now


def accumulating(fabric: Fabric, wrapped: Any, unfinished: bool) -> AbstractContextManager[Any]:
    """Where a micro-batch's loss and gradient are computed; while the step is unfinished, no gradient is sent."""
    if not unfinished or isinstance(fabric.strategy, DeepSpeedStrategy):  # which sees to it by itself
        return nullcontext()
    return fabric.no_backward_sync(wrapped)


def backward(fabric: Fabric, wrapped: Any, loss: Tensor, *, part: int, parts: int) -> None:
    """Add the gradient of one of `parts` micro-batches' losses; only the last one's is summed over the processes."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):  # which divides by itself, and counts by calls of step
        fabric.backward(loss)
        if part + 1 < parts:
            wrapped._forward_module.step()
        return
    fabric.backward(loss / parts if parts > 1 else loss)


def clip_and_step(fabric: Fabric, module: nn.Module, wrapped: Any, optimizer: Any, max_norm: float) -> float:
    """Let the optimizer take a step with the gradient, clipped; not if it is not finite. Gradients are then gone.

    Returns:
        The gradient's global norm before clipping, the same number in all processes; NaN or infinity if there was no
        step. A GPU is waited for.

    Raises:
        FloatingPointError: DeepSpeed has taken a step with a gradient that is not finite, as it does in float32.
    """
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        engine = wrapped._forward_module
        skipped = engine.skipped_steps
        engine.step()  # Fabric's optimizer would go round it, and it would not count
        norm = float(engine.get_global_grad_norm() or 0.0)
        if engine.skipped_steps > skipped:
            return math.nan
        if not math.isfinite(norm):
            raise FloatingPointError(
                "the gradient is not finite, and DeepSpeed cannot skip a step in precision '32-true': the weights are "
                "lost; resume from the last checkpoint, with another strategy or precision"
            )
        return norm
    total = fabric.clip_gradients(module, optimizer, max_norm=max_norm, error_if_nonfinite=False)
    assert total is not None
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def on_rank_zero(fabric: Fabric, work: Callable[[], _T]) -> _T:
    """What `work` gives in the first process, in all of them; an error in it is raised in all of them."""
    result: Any = None
    if fabric.is_global_zero:
        try:
            result = work()
        except Exception as error:
            if fabric.world_size == 1:
                raise
            result = _Failure(_picklable(error))
    result = fabric.broadcast(result)
    if isinstance(result, _Failure):
        raise result.error
    return cast(_T, result)


class _Failure:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second that `device` reaches in a large matrix product: the best of ten.

    Of fewer where they would take more than a third of a second, as bfloat16 may on a CPU.
    """
    size = 8192 if device.type == "cuda" else 768
    left, right = torch.rand(2, size, size, device=device, dtype=dtype)

    def seconds() -> float:
        start = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(product.device)
        return time.perf_counter() - start

    times = [seconds()]  # the first one may start threads and load libraries
    while len(times) < 11 and sum(times) < 0.3:
        times.append(seconds())
    return 2 * size**3 / min(times)


def _check_devices(config: TrainConfig, device: torch.device) -> None:
    if device.type == "cuda":
        here, name = torch.cuda.device_count(), "CUDA devices"
    else:
        here, name = os.cpu_count() or 1, "cores"
    if config.devices > here:
        raise ValueError(f"devices is {config.devices}, but this machine has {here} {name}")
    world = os.environ.get("WORLD_SIZE")
    processes = config.devices * config.num_nodes
    if world is not None and int(world) != processes:
        raise ValueError(
            f"devices x num_nodes is {config.devices} x {config.num_nodes}, but the launcher started {world} processes "
            "(WORLD_SIZE)"
        )
    if config.strategy == "deepspeed":
        if find_spec("deepspeed") is None:
            raise ValueError("strategy is 'deepspeed', which is not installed; pip install 'tinyllm[deepspeed]'")
        if device.type != "cuda":
            raise ValueError("strategy is 'deepspeed', which runs on CUDA devices only; on a CPU take 'fsdp' or 'ddp'")


def _strategy(config: TrainConfig, device: torch.device) -> Strategy | str:
    processes = config.devices * config.num_nodes
    if config.strategy == "deepspeed":
        return DeepSpeedStrategy(config=deepspeed_config(config))
    if config.strategy == "fsdp":
        policy = torch.bfloat16 if config.precision == "bf16-mixed" else None
        return ModelParallelStrategy(
            partial(_shard, compute_dtype=policy),
            data_parallel_size=processes,
            tensor_parallel_size=1,
            timeout=_TIMEOUT,
        )
    if processes > 1 or config.strategy == "ddp":
        return DDPStrategy(timeout=_TIMEOUT, gradient_as_bucket_view=True)
    return "auto"


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's own settings for `config`: ZeRO stage 2, our clipping, our share of a step."""
    share = config.batch_size // (config.devices * config.num_nodes * config.micro_batches)
    return {
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
    }


def _shard(module: TrainingModule, mesh: DeviceMesh, compute_dtype: torch.dtype | None) -> TrainingModule:
    """FSDP2: every block by itself, so that only one or two are whole at a time, and the rest together."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    across = mesh["data_parallel"]
    for block in module.model.transformer_blocks:
        fully_shard(block, mesh=across, mp_policy=policy)
    fully_shard(module, mesh=across, mp_policy=policy)
    model = module.model
    if next(model.parameters()).is_meta:
        module.to_empty(device=mesh.device_type)
        if model.config.tie_embeddings:  # to_empty has made two of the one weight
            model.embedding.embedding.weight = model.output.weight
    return module
