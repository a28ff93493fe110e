"""What Lightning has to be told: there are no gradients to reduce, and one pass is all there is."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch import distributed as dist

from corrsteer_pl.errors import UserError


def prepare(trainer: Trainer) -> None:
    """Check a trainer's strategy and precision, and free DDP of its gradient wrapper.

    ``DistributedDataParallel`` refuses a module without trainable parameters, and would overwrite every
    process's sums with those of rank 0. The sums are merged by :func:`all_reduce_sum` instead.

    Raises:
        UserError: A strategy or a precision under which the sums would be wrong.
    """
    if trainer.precision != "32-true":
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
        strategy.configure_ddp = lambda: None  # type: ignore[method-assign]
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__}, which shards or wraps trainable parameters; a fit has "
            "none. Use --trainer.strategy ddp (or auto with one device)."
        )


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; nothing to do when there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_lists(items: list) -> list:
    """The items of all processes, in order of rank; the list itself when there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    gathered: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
