"""The engine: the processes of a training, its devices, and how they share the work.

Lightning Fabric starts the processes, places the model, shards or replicates it, and sums the gradients. `Engine` says
what of it the loop in `tinyllm.training.loop` uses, so that nothing else depends on the strategy.
"""

from __future__ import annotations

import atexit
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
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tinyllm._internal.cpus import share_threads
from tinyllm._internal.interrupt import holding_ctrl_c
from tinyllm._internal.words import count
from tinyllm.config.training import TrainConfig
from tinyllm.model import SimpleLLM, choose_device, init_gpt2_weights
from tinyllm.optim import AdamW

_T = TypeVar("_T")

# How long processes wait for each other: the first one may be tokenizing text meanwhile.
_TIMEOUT = timedelta(hours=2)

_DEEPSPEED = "deepspeed"  # the folder of its state in a checkpoint


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
        """Compute the loss, see `SimpleLLM.loss`, or without targets the logits. ids, targets: int64 (B, T)."""
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


class Engine:
    """The processes of a training, this one's device, and the model as they share it.

    All processes call its methods together, but for those of `rank`, `device` and the like.

    Args:
        fabric: with our settings, see `launch`.

    Attributes:
        device: where this process computes.
        rank, world_size: the number of this process, from 0, and how many there are.
        module: the `TrainingModule` as the strategy wraps it, once there is one.
        optimizer: likewise.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self.module: Any = None
        self.optimizer: Any = None

    @property
    def device(self) -> torch.device:
        return self._fabric.device

    @property
    def rank(self) -> int:
        return self._fabric.global_rank

    @property
    def world_size(self) -> int:
        return self._fabric.world_size

    def setup(
        self,
        module: TrainingModule,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        fill: Callable[[], None] | None = None,
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        """Place a module, and shard it if the strategy does, and make its optimizer.

        A model on the meta device, which only "fsdp" takes, gets its weights when each process has its part of it:
        those that `init_gpt2_weights` draws from a generator of this seed.

        Args:
            module: moved, and sharded, in place.
            make_optimizer: called with the module when its weights lie where they will be trained.
            fill: replaces the first weights, as soon as the model has memory for them.
            seed: of the weights of a model on the meta device.
            compiled: whether torch.compile runs the module.
        """
        on_meta = next(module.parameters()).is_meta
        if fill is not None and not on_meta:
            fill()
        self._wrap(module, torch.compile(module) if compiled else module, make_optimizer)
        if on_meta:
            init_gpt2_weights(module.model, generator=torch.Generator().manual_seed(seed))
            if fill is not None:
                fill()

    def _wrap(self, module: TrainingModule, called: Any, make_optimizer: Callable[[nn.Module], Any]) -> None:
        self.module = self._fabric.setup_module(called)
        self.optimizer = self._fabric.setup_optimizers(make_optimizer(module))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of a batch, which may lie on the CPU."""
        inputs, targets = (tensor.to(self.device, non_blocking=True) for tensor in (inputs, targets))
        loss: Tensor = self.module(inputs, targets)
        return loss

    def accumulate(self, inputs: Tensor, targets: Tensor, *, part: int, parts: int) -> Tensor:
        """Add the gradient of one of a step's `parts` micro-batches; return its part of the step's loss, detached.

        Only the last one's call sums the gradients over the processes.
        """
        last = part + 1 == parts
        with nullcontext() if last else self._fabric.no_backward_sync(self.module):
            loss = self.loss(inputs, targets)
            loss = loss / parts if parts > 1 else loss
            self._fabric.backward(loss)
        return loss.detach()

    def clip_and_step(self, max_norm: float) -> float:
        """Let the optimizer take a step with the gradient, clipped; not if it is not finite. Gradients are then gone.

        Returns:
            The gradient's global norm before clipping, the same number in all processes; NaN or infinity if there was
            no step. A GPU is waited for.

        Raises:
            FloatingPointError: DeepSpeed has taken a step with a gradient that is not finite, as it does in float32.
        """
        optimizer = self.optimizer.optimizer
        if isinstance(optimizer, AdamW):
            norm = float(optimizer.clip_and_step(max_norm))
        else:
            total = self._fabric.clip_gradients(self.module, optimizer, max_norm=max_norm, error_if_nonfinite=False)
            assert total is not None
            norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
            if math.isfinite(norm):
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save_own_state(self, folder: Path) -> bool:
        """Write the optimizer's state, if the strategy has a format of its own; return whether it has."""
        return False

    def load_own_state(self, folder: Path) -> bool:
        """Load what `save_own_state` has written to a checkpoint's folder; return whether there is such a state.

        Raises:
            ValueError: the checkpoint was written by another strategy than this one can go on from.
        """
        if (folder / _DEEPSPEED).is_dir():
            raise ValueError(f"{folder} was written by strategy 'deepspeed', and has to be taken up by it")
        return False

    def on_rank_zero(self, work: Callable[[], _T]) -> _T:
        """Run `work` on rank 0, and return its result, or raise its error, in all processes."""
        result: Any = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as error:
                if self.world_size == 1:
                    raise
                result = _Failure(_picklable(error))
        result = self._fabric.broadcast(result)
        if isinstance(result, _Failure):
            self.close_at_exit()  # of all of them, as the error is everybody's
            raise result.error
        return cast(_T, result)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes."""
        if self.world_size == 1:
            return tensor
        summed = self._fabric.all_reduce(tensor.to(self.device), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(int(flag))) > 0)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self._fabric.barrier()

    def close_at_exit(self) -> None:
        """Have the processes' connection closed when this one exits: threads of gloo that still run then have crashed
        it. For processes that have all come to their end; after an error in one of them closing might wait for what
        never comes."""
        atexit.unregister(_close_connection)
        atexit.register(_close_connection)

    def peak_flops(self, precision: str) -> float:
        """Measure how many floating-point operations a second all devices together reach, see `peak_flops`."""
        dtypes = {torch.float32} if precision == "32-true" else {torch.float32, torch.bfloat16}
        return max(peak_flops(self.device, dtype) for dtype in dtypes) * self.world_size

    @contextmanager
    def ending_others(self) -> Iterator[None]:
        """End the processes that this one has started if Ctrl-C ends it: they would tell at length that it has gone."""
        try:
            yield
        except KeyboardInterrupt:
            started = getattr(self._fabric.strategy.launcher, "procs", [])
            others = list(started)
            started.clear()  # Lightning watches the list, and would kill this process when one of the others ends
            for process in others:
                process.kill()
            raise


class DeepSpeedEngine(Engine):
    """DeepSpeed's ways: it makes its own copy of the weights, clips and counts steps itself, and has its own format."""

    def _wrap(self, module: TrainingModule, called: Any, make_optimizer: Callable[[nn.Module], Any]) -> None:
        self.module, self.optimizer = self._fabric.setup(called, make_optimizer(module))

    @property
    def _engine(self) -> Any:
        return self.module._forward_module

    def accumulate(self, inputs: Tensor, targets: Tensor, *, part: int, parts: int) -> Tensor:
        """Add a micro-batch's gradient; DeepSpeed divides by their number itself, which it counts by calls of step."""
        loss = self.loss(inputs, targets)
        self._fabric.backward(loss)
        if part + 1 < parts:
            self._engine.step()
        return loss.detach() / parts

    def clip_and_step(self, max_norm: float) -> float:
        """Take a step, clipped as `deepspeed_config` has it; see `Engine.clip_and_step`."""
        skipped = self._engine.skipped_steps
        self._engine.step()  # Fabric's optimizer would go round it, and it would not count
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        if self._engine.skipped_steps > skipped:
            return math.nan
        if not math.isfinite(norm):
            raise FloatingPointError(
                "the gradient is not finite, and DeepSpeed cannot skip a step in precision '32-true': the weights are "
                "lost; resume from the last checkpoint, with another strategy or precision"
            )
        return norm

    def save_own_state(self, folder: Path) -> bool:
        """Write DeepSpeed's folder into a checkpoint's."""
        self._fabric.save(folder / _DEEPSPEED, {"model": self.module, "optimizer": self.optimizer})
        return True

    def load_own_state(self, folder: Path) -> bool:
        """Load DeepSpeed's folder from a checkpoint's."""
        if not (folder / _DEEPSPEED).is_dir():
            raise ValueError(f"{folder} was not written by strategy 'deepspeed', which can only take up its own")
        self._fabric.load(folder / _DEEPSPEED, {"model": self.module, "optimizer": self.optimizer})
        return True


def _close_connection() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
    """Measure how many multiplications and additions a second `device` reaches in a large matmul.

    It is the best of ten, or of fewer if these would take more than a third of a second, as bfloat16 may on a CPU.
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


def launch(config: TrainConfig, say: Callable[[str], None] = lambda line: None) -> Engine:
    """Start the processes that `config` asks for; each goes on from here, with its engine.

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
        engine = (DeepSpeedEngine if config.strategy == "deepspeed" else Engine)(fabric)
        if device.type == "cpu" and config.devices * config.num_nodes > 1:
            share_threads(config.devices)
        with engine.ending_others():
            fabric.launch()
    return engine


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


def _check_devices(config: TrainConfig, device: torch.device) -> None:
    if device.type == "cuda":
        here, name = torch.cuda.device_count(), "CUDA devices"
    else:
        here, name = os.cpu_count() or 1, "cores"  # all processes together, which a launcher may bind to some each
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
            raise ValueError("strategy is 'deepspeed', which is not installed; the extra tinyllm[deepspeed] brings it")
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
    """Return DeepSpeed's own settings for `config`: ZeRO stage 2, our clipping, our share of a step."""
    share = config.batch_size // (config.devices * config.num_nodes * config.micro_batches)
    return {
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": config.micro_batches,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
    }


def _shard(module: TrainingModule, mesh: DeviceMesh, compute_dtype: torch.dtype | None) -> TrainingModule:
    """Shard by FSDP2 every block by itself, so that only one or two are whole at a time, and the rest together."""
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
