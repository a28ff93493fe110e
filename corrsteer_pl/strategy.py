"""Processes: what Lightning's strategies need to be told, and exchange between processes."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch import distributed as dist

from corrsteer_pl.errors import UserError


def prepare(trainer: Trainer, trains: bool) -> None:
    """Check a trainer's strategy and precision, and set up DDP for a method with or without gradients.

    ``DistributedDataParallel`` averages gradients, which a method that trains needs. It refuses a module without
    trainable parameters, and copies the buffers of rank 0 over those of the others; so it is left out for a method that
    merges sums instead, and never copies buffers.

    Args:
        trainer: The trainer.
        trains: Whether the method trains parameters.

    Raises:
        UserError: A strategy or a precision under which the result would be wrong.
    """
    if trainer.precision != "32-true" and not trains:
        raise UserError(
            f"trainer.precision is {trainer.precision}, which would also cast the running sums. "
            "Leave it at 32-true and set the language model's own precision with model.dtype."
        )
    if (trainer.min_epochs or 0) > 1:
        raise UserError(
            f"trainer.min_epochs is {trainer.min_epochs}, but a second epoch would count every sample twice. "
            "Leave it out."
        )
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs["broadcast_buffers"] = False
        if not trains:
            strategy.configure_ddp = lambda: None  # type: ignore[method-assign]
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__}, which shards or wraps the module in another way than a "
            "method expects. Use --trainer.strategy ddp (or auto with one device)."
        )


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; nothing to do when there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def this_process() -> int:
    """The number of this process; 0 when there is one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_lists(items: list) -> list:
    """The items of all processes, in order of rank; the list itself when there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    gathered: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
