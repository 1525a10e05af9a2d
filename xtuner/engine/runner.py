"""mmengine's runner with our loop and checkpoints; what it would write and nobody reads is switched off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mmengine.runner
import torch
from mmengine.dist import all_reduce, get_dist_info
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.visualization import TensorboardVisBackend, Visualizer, WandbVisBackend

from xtuner.adapters.attach import trainable_parameters
from xtuner.engine.checkpoint.trainer_state import STATE_FILE, read_state
from xtuner.engine.distributed import Strategy
from xtuner.engine.distributed.watchdog import Watchdog
from xtuner.engine.loop import Skips, TrainLoop
from xtuner.errors import CheckpointError, one_line
from xtuner.fused.enable import activation_budget, set_activation_budget
from xtuner.utils.fields import Field, check_fields
from xtuner.utils.out_of_memory import is_out_of_memory

logger = logging.getLogger('xtuner')

_STATE_FIELDS = {
    'parameters': Field(list[str]), 'optimizer': Field(dict[Any, Any]), 'scaler': Field(dict[str, Any]),
    'skips': Field(dict[str, Any]), 'step': Field(int, minimum=0, maximum=10**9),
    'activation_rooms': Field(list[int | None], minimum=0),
}  # fmt: skip
_TRACKERS = {'tensorboard': TensorboardVisBackend, 'wandb': WandbVisBackend}


class Runner(mmengine.runner.Runner):
    """Holds model, optimizer, loop and hooks of one run.

    Args:
        strategy: Holds model and optimizer.
        dataloader: Micro-batches in the plan's order.
        hooks: Ours and the user's, called by priority.
        work_dir: Where everything is written.
        seed: Base seed.
        trackers: 'tensorboard', 'wandb'.
        launcher: 'none', 'pytorch' or 'slurm'.
        watch: Over the ranks, where there are several.
        write_model: Writes the adapter (or the whole model) and tokenizer into a checkpoint's folder, given
            `strategy.weights()`.
    """

    def __init__(
        self,
        strategy: Strategy,
        dataloader: Iterable[Any],
        *,
        watch: Watchdog | None = None,
        hooks: Sequence[Hook],
        work_dir: Path,
        seed: int,
        trackers: Sequence[str],
        launcher: str,
        write_model: Callable[[Path, Any], None],
    ) -> None:
        self.strategy, self.watch = strategy, watch
        self.write_model = write_model
        self._trackers = list(trackers)
        super().__init__(
            model=strategy.module,
            work_dir=str(work_dir),
            train_dataloader=dataloader,
            train_cfg={'type': TrainLoop},
            optim_wrapper=OptimWrapper(strategy.optimizer),
            default_hooks=None,
            custom_hooks=[RuntimeInfoHook(), *hooks],
            launcher=launcher,
            randomness={'seed': seed},
            experiment_name=work_dir.resolve().name,
            default_scope=None,
            cfg={},
        )
        self._work_dir = str(work_dir)  # mmengine makes it absolute; lines name it as the user did

    def set_loop(self, **arguments: Any) -> None:
        """Puts a `TrainLoop` with these arguments in place of mmengine's loops."""
        self._train_loop = TrainLoop(self, self._train_dataloader, **arguments)

    def trainer_state(self, step: int) -> dict[str, Any]:
        """What a resumed run needs besides the weights, after `step` optimizer steps; every rank calls it."""
        loop = self.train_loop
        return {
            'step': step,
            'parameters': list(trainable_parameters(self.bare_model)),
            'optimizer': self.strategy.optimizer_state(),
            'scaler': loop.scaler.state_dict(),
            'skips': loop.skips.state(),
            'activation_rooms': self._activation_budgets(),
        }

    def restore(self, folder: Path) -> None:
        """Sets optimizer, scaler and step to a checkpoint's; its weights were loaded with the model.

        The optimizer's settings stay the config's: `check_same_run` has checked that they are equal or may differ.

        Raises:
            CheckpointError: the checkpoint is of a run that trained other parameters.
        """
        state, optimizer = read_state(folder), self.optim_wrapper.optimizer
        parameters = list(trainable_parameters(self.bare_model))
        check_fields(state, _STATE_FIELDS, folder / STATE_FILE, CheckpointError)
        if missing := [name for name in _STATE_FIELDS if name not in state]:
            raise CheckpointError(
                f'{folder}: cannot resume, its trainer state has no {missing[0]!r}; --start-from takes its weights'
            )
        if state['parameters'] != parameters:
            raise CheckpointError(
                f'{folder}: cannot resume, the trainable parameters are not the same ({len(state["parameters"])} then, '
                f'{len(parameters)} now); use the config it was written with'
            )
        settings = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
        try:
            self._take(state)
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group.update(setting)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f'{folder}: cannot resume, its trainer state does not fit this run: {one_line(error)}; --start-from '
                'takes its weights'
            ) from error

    def _take(self, state: dict[str, Any]) -> None:
        loop = self.train_loop
        self.strategy.load_optimizer_state(state['optimizer'])
        if state['scaler'] != {}:  # of a run that scaled no loss
            loop.scaler.load_state_dict(state['scaler'])
        loop.skips = Skips(**state['skips'])
        loop.step = state['step']
        budgets = state['activation_rooms']
        if len(budgets) == self.strategy.world_size and budgets[self.strategy.rank] is not None:
            set_activation_budget(self.bare_model.llm, budgets[self.strategy.rank])

    def _activation_budgets(self) -> list[int | None]:
        """Each rank's activation budget in bytes, by which it recomputes layers; None: it has none."""
        mine = torch.full((self.strategy.world_size,), -1, dtype=torch.int64)
        budget = activation_budget(self.bare_model.llm)
        mine[self.strategy.rank] = -1 if budget is None else max(0, budget)
        all_reduce(mine, 'max')
        return [None if budget < 0 else budget for budget in mine.tolist()]

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Refuses mmengine's resume, which unpickles the file that it is given; use `restore`.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError('mmengine resumes from pickles, which nothing here reads; use --resume or --start-from')

    load_checkpoint = resume

    # mmengine's runner does more than a fine-tuning run needs; the overrides below switch that off.
    def build_logger(self, log_level: int | str = 'INFO', log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Mmengine's own logger, for its warnings only; the project logs through `logging.getLogger('xtuner')`."""
        return MMLogger.get_instance(self._experiment_name, log_level='WARNING')

    def build_visualizer(self, visualizer: Any = None) -> Visualizer:
        """The trackers the config named, writing below the work folder."""
        folders = {name: Path(self.work_dir) / name for name in self._trackers}
        board = folders.get('tensorboard')
        # TensorBoard calls a run by its folder below the one that it was opened with. A run begun by an earlier version
        # has its events in that folder itself, and goes on there.
        if board is not None and not any(board.glob('events.out.*')):
            folders['tensorboard'] = board / Path(self.work_dir).resolve().name
        backends = [_TRACKERS[name](save_dir=str(folder)) for name, folder in folders.items()]
        return Visualizer(name=self._experiment_name, vis_backends=backends if self.rank == 0 else [])

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Shows a text in TensorBoard, whose files stay here; what other trackers get leaves this machine."""
        for backend in self.visualizer._vis_backends.values():
            if isinstance(backend, TensorboardVisBackend):
                literal = ''.join(f'    {line}\n' for line in text.splitlines())  # as it is, not as Markdown
                backend.experiment.add_text(tag, literal, step)

    def wrap_model(self, model_wrapper_cfg: Any, model: torch.nn.Module) -> torch.nn.Module:
        """The strategy has wrapped it already."""
        return model

    @property
    def bare_model(self) -> Any:
        """The `TrainingModel` itself, without what wraps it for several ranks."""
        return self.strategy.bare

    @property
    def timestamp(self) -> str:
        """Empty: mmengine would make a folder of this name for logs that are not written here."""
        return ''

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Reads rank and world size; threads, process group and seeds are set before."""
        self._rank, self._world_size = get_dist_info()
        self._timestamp = ''

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Does nothing: `xtuner doctor` reports the environment."""

    def register_default_hooks(self, hooks: Any = None) -> None:
        """Registers none: `engine.assemble` names every hook."""

    def get_hooks_info(self) -> str:
        """Mmengine logs this; the order of hooks is in their priorities."""
        return ''

    def dump_config(self) -> None:
        """Does nothing: `checkpoint.resume.open_work_dir` has written the flat config."""
